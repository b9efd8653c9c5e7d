// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits of the process and of the system that bound the number of mappings.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::check::Check;

/// Mappings that an introspector is expected to hold at once.
const USUAL_MAPPINGS: u64 = 4096;

/// RLIMIT_MEMLOCK: in an introspector, each mapped page counts.
pub(super) fn memlock_in_guest() -> Check {
    const NAME: &str = "memlock";
    match getrlimit(Resource::Memlock).current {
        None => Check::ok(NAME, "RLIMIT_MEMLOCK is unlimited"),
        Some(bytes) => {
            let pages = bytes / kvmmem::PAGE_SIZE as u64;
            let detail = format!("RLIMIT_MEMLOCK allows {pages} mapped pages");
            let remedy = "raise it: ulimit -l unlimited, or /etc/security/limits.conf; root with CAP_IPC_LOCK is exempt";
            match pages {
                0 => Check::fail(NAME, detail, remedy),
                pages if pages < USUAL_MAPPINGS => Check::warn(NAME, detail, remedy),
                _ => Check::ok(NAME, detail),
            }
        }
    }
}

/// RLIMIT_MEMLOCK on a host, where nothing is locked.
pub(super) fn memlock_on_host() -> Check {
    let limit = getrlimit(Resource::Memlock)
        .current
        .map_or_else(|| "unlimited".to_owned(), |bytes| format!("{} KiB", bytes / 1024));
    Check::ok(
        "memlock",
        format!("RLIMIT_MEMLOCK is {limit}; a host locks no memory, introspectors need it inside"),
    )
}

/// vm.max_map_count, from which the VMM takes its limit.
pub(super) fn max_map_count() -> Check {
    const NAME: &str = "max_map_count";
    let Ok(count) = fs::read_to_string("/proc/sys/vm/max_map_count") else {
        return Check::warn(NAME, "vm.max_map_count cannot be read", "is /proc mounted?");
    };
    let pages = kvmmem_vmm::introspect::mapping_limit();
    let detail =
        format!("vm.max_map_count is {}: {pages} mapped pages per introspector", count.trim());
    if (pages as u64) < USUAL_MAPPINGS {
        Check::warn(NAME, detail, "raise it: sysctl -w vm.max_map_count=1048576")
    } else {
        Check::ok(NAME, detail)
    }
}
