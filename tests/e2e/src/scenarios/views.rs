// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views: a file attached once, then the Unix calls on it.

pub(crate) mod act;
pub(crate) mod answers;
mod ends;
mod grants;
mod hostile;
mod memory_limit;
mod regions;
mod tools;
mod use_it;

use anyhow::{Context, Result};

use crate::raw::Raw;
use crate::scenarios::Scenario;

/// The scenarios of this folder, in the order in which they run.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "views_act",
        purpose: "a tool attaches, scans, watches, and loses its view",
        run: act::act,
    },
    Scenario {
        name: "views_look",
        purpose: "attach read-only, then pread, mmap, lseek, poll; nothing can be written",
        run: use_it::look,
    },
    Scenario {
        name: "views_write",
        purpose: "a store and a pwrite reach the target where the grant says rw",
        run: use_it::write,
    },
    Scenario {
        name: "views_large_pages",
        purpose: "an aligned mapping fills by 2 MiB a fault",
        run: use_it::large_pages,
    },
    Scenario {
        name: "views_fork_exec",
        purpose: "what a child and a new program have of a view",
        run: use_it::fork_exec,
    },
    Scenario {
        name: "views_scope",
        purpose: "a grant of some ranges shows those alone, to each process its own",
        run: grants::scope,
    },
    Scenario {
        name: "views_grants",
        purpose: "holder, uses, life, policy: who may attach, how often, how long",
        run: grants::rules,
    },
    Scenario {
        name: "views_regions",
        purpose: "libkvmi's region calls on the same device",
        run: regions::regions,
    },
    Scenario {
        name: "views_hostile",
        purpose: "floods, nonsense, and a kernel that writes to a read-only window",
        run: hostile::hostile,
    },
    Scenario {
        name: "views_tools",
        purpose: "attach, dump, scan, translate by the command line, in the guest and on the host",
        run: tools::tools,
    },
    Scenario {
        name: "views_answers",
        purpose: "processes, modules, log of a Linux target: the same rows in the guest and on the host",
        run: answers::answers,
    },
    Scenario {
        name: "views_revoke",
        purpose: "a grant is revoked under a process that reads",
        run: ends::revoke,
    },
    Scenario {
        name: "views_memory_limit",
        purpose: "a limit on the introspector bounds what its reads of untouched memory allocate",
        run: memory_limit::memory_limit,
    },
    Scenario {
        name: "views_process_death",
        purpose: "a killed tool leaves no view behind",
        run: ends::process_death,
    },
    Scenario {
        name: "views_target_death",
        purpose: "the target's VMM dies under a view",
        run: ends::target_death,
    },
    Scenario {
        name: "views_broker_death",
        purpose: "without a broker no grant can be revoked: views end",
        run: ends::broker_death,
    },
];

/// One field of a counted answer, `stats` or `ranges`.
fn field(tool: &mut Raw, command: &str, index: usize) -> Result<String> {
    let answer = tool.must(command)?;
    answer.split(' ').nth(index).map(str::to_owned).with_context(|| format!("{command}: {answer}"))
}

/// The state of a view: 1 open, 2 revoked, 3 gone.
fn state(tool: &mut Raw, slot: &str) -> Result<String> {
    field(tool, &format!("ranges {slot}"), 1)
}
