// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An introspector under a stock QEMU without the module: its tools map PCI devices by themselves.

use std::fs;

use kvmmem::view::default_socket;
use kvmmem_proto::client::connect;

use super::check::Check;

/// What the kernel lets processes do, `none` in brackets if everything.
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

pub(super) fn checks(is_root: bool) -> [Check; 2] {
    let lockdown = fs::read_to_string(LOCKDOWN).unwrap_or_default();
    let has_proxy = !is_root && connect(&default_socket()).is_ok();
    [check_module(), check_views(is_root, has_proxy, &lockdown)]
}

/// What is lacking without it.
fn check_module() -> Check {
    Check::warn(
        "module",
        "kvmmem is not loaded: tools map PCI devices by /sys, if the host trusts this virtual machine as a whole; each \
         process that is root may see every view, and a tool that hangs when its view ends costs a PCI port until a reset",
        "this is enough for tools that are trusted; otherwise load the module (docs/guide/introspector.md)",
    )
}

fn check_views(is_root: bool, has_proxy: bool, lockdown: &str) -> Check {
    const NAME: &str = "views";
    let is_locked = lockdown.contains('[') && !lockdown.contains("[none]");
    if is_locked {
        return Check::fail(
            NAME,
            format!("the kernel is locked down ({}) and maps no PCI devices", lockdown.trim()),
            "load the module kvmmem, or boot without lockdown= and Secure Boot",
        );
    }
    if has_proxy {
        return Check::ok(NAME, "can be attached by kvmmem proxy: memory is read, and not mapped");
    }
    if !is_root {
        return Check::fail(
            NAME,
            "without the module, only root can attach views",
            "run tools as root, or kvmmem proxy as root with a group that this user is in, or load the module",
        );
    }
    Check::ok(NAME, "can be attached without the module, by PCI devices in /sys")
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn root_can_attach_where_the_kernel_is_not_locked_down() {
        for (is_root, has_proxy, lockdown, status) in [
            (true, false, "[none] integrity confidentiality\n", Status::Ok),
            (true, false, "", Status::Ok),
            (true, false, "none [integrity] confidentiality\n", Status::Fail),
            (false, false, "", Status::Fail),
            (false, true, "", Status::Ok),
            (false, true, "none [integrity] confidentiality\n", Status::Fail),
        ] {
            let check = check_views(is_root, has_proxy, lockdown);
            assert_eq!(check.status, status, "{is_root} {has_proxy} {lockdown}");
        }
        assert_eq!(check_module().status, Status::Warn);
    }
}
