// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end-to-end scenarios, by name. Each starts with all VMs running and may break them; the
//! runner restarts what is broken.

mod cases;
pub(crate) mod death;
mod doorbell;
mod host;
pub(crate) mod mapping;
mod module;
mod moduleless;
mod ownership;
mod qemu;
pub(crate) mod refusals;
mod sandbox;
mod vcpus;
pub(crate) mod views;

use anyhow::Result;

use crate::report::Report;
use crate::world::World;

/// One scenario.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// What it shows, in a line.
    pub(crate) purpose: &'static str,
    pub(crate) run: fn(&mut World, &mut Report) -> Result<()>,
}

/// All scenarios, in the order in which they run: of v1, then of views, then of
/// VMs under stock QEMUs, with the module and without; those that end a VM come last in each part.
pub(crate) fn all() -> impl Iterator<Item = &'static Scenario> {
    V1.iter().chain(cases::ALL).chain(views::ALL).chain(qemu::ALL).chain(moduleless::ALL)
}

/// Whether `name` is this scenario's, or that of its part: `views` for all that begin with
/// `views_`.
pub(crate) fn is_named(scenario: &Scenario, name: &str) -> bool {
    scenario.name == name
        || scenario.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('_'))
}

const V1: &[Scenario] = &[
    Scenario {
        name: "map_basic",
        purpose: "token by vsock, map, read, watch, write, unmap",
        run: mapping::map_basic,
    },
    Scenario {
        name: "token_rules",
        purpose: "a token works once, for three seconds, and at most 64 wait",
        run: refusals::token_rules,
    },
    Scenario {
        name: "refusals",
        purpose: "each bad request gets its errno",
        run: refusals::refusals,
    },
    Scenario {
        name: "other_process_fd",
        purpose: "a file serves the process that opened it",
        run: ownership::other_process_fd,
    },
    Scenario {
        name: "close_one_of_two_files",
        purpose: "closing a file undoes its own mappings and no others",
        run: ownership::close_one_of_two_files,
    },
    Scenario {
        name: "munmap_before_unmap",
        purpose: "the tool gives its page away before UNMAP",
        run: ownership::munmap_before_unmap,
    },
    Scenario {
        name: "fork_exec",
        purpose: "a child and a new program get nothing of a mapping",
        run: ownership::fork_exec,
    },
    Scenario {
        name: "sigkill_tool",
        purpose: "a killed tool leaves nothing behind, also where its file lives on",
        run: ownership::sigkill_tool,
    },
    Scenario {
        name: "memlock",
        purpose: "mappings count against RLIMIT_MEMLOCK",
        run: ownership::memlock,
    },
    Scenario {
        name: "many_mappings",
        purpose: "4,096 live mappings in one process",
        run: mapping::many_mappings,
    },
    Scenario {
        name: "two_processes",
        purpose: "two tools at once, in two processes",
        run: mapping::two_processes,
    },
    Scenario {
        name: "rmmod_in_use",
        purpose: "the module stays while its device is open",
        run: module::rmmod_in_use,
    },
    Scenario {
        name: "flood",
        purpose: "a tool that sends nonsense in a loop disturbs no other",
        run: host::flood,
    },
    Scenario {
        name: "cli",
        purpose: "the command line, in the guest and on the host",
        run: host::cli,
    },
    Scenario {
        name: "vcpus",
        purpose: "registers and pauses of a VM of kvmmem vm, also when who asked for it dies",
        run: vcpus::vcpus,
    },
    Scenario {
        name: "sandbox",
        purpose: "a VMM works in its sandbox, and leaks no descriptor",
        run: sandbox::sandbox,
    },
    Scenario {
        name: "target_death",
        purpose: "the target's VMM dies while mapped: the page stays readable until undone",
        run: death::target_death,
    },
    Scenario {
        name: "introspector_death",
        purpose: "the introspector's VMM dies while mapped: nothing leaks, the target keeps running",
        run: death::introspector_death,
    },
    Scenario {
        name: "introspector_reboot",
        purpose: "the introspector restarts while mapped: the host gives its pages back first",
        run: death::introspector_reboot,
    },
    Scenario {
        name: "doorbell",
        purpose: "the same by port I/O, for hosts without Xen's interception",
        run: doorbell::doorbell,
    },
];
