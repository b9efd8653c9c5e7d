// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a machine can be used for, by its checks.

use clap::ValueEnum;
use serde::Serialize;

use super::check::{Check, Role, Status};

/// A use of kvmmem. Each takes some of the checks of its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Use {
    /// Host: look at its virtual machines from the host itself
    Look,
    /// Host: run targets under kvmmem vm
    Targets,
    /// Host: run introspectors under kvmmem vm
    Introspectors,
    /// Host: let virtual machines under a stock QEMU be introspectors
    QemuIntrospectors,
    /// Guest: look at targets by views
    Views,
    /// Guest: map single pages by tokens of KVMI (v1)
    Pages,
    /// Guest: read and write targets over KVMI
    Kvmi,
}

/// What came out for a use.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    #[serde(rename = "use")]
    pub(super) what: Use,
    /// `Warn`: possible, and a check names what to look at.
    pub(super) status: Status,
    /// The checks that failed or warn.
    pub(super) see: Vec<&'static str>,
}

impl Use {
    pub(super) fn role(self) -> Role {
        match self {
            Self::Look | Self::Targets | Self::Introspectors | Self::QemuIntrospectors => {
                Role::Host
            }
            Self::Views | Self::Pages | Self::Kvmi => Role::Guest,
        }
    }

    /// What it is, after "this machine can" and "cannot".
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Look => "look at this host's virtual machines from the host",
            Self::Targets => "run targets under kvmmem vm",
            Self::Introspectors => "run introspectors under kvmmem vm",
            Self::QemuIntrospectors => "let virtual machines under a stock QEMU be introspectors",
            Self::Views => "look at targets by views",
            Self::Pages => "map single pages by tokens of KVMI",
            Self::Kvmi => "read and write targets over KVMI",
        }
    }

    /// Names of the checks that it takes; one that was not made is not needed.
    fn needs(self, is_root: bool) -> &'static [&'static str] {
        match self {
            // Root needs none: each command is its own.
            Self::Look if is_root => &[],
            Self::Look => &["broker"],
            Self::Targets => &["kvm", "hardware", "broker"],
            Self::Introspectors => {
                &["kvm", "hardware", "hypercalls", "vhost_vsock", "max_map_count", "broker"]
            }
            Self::QemuIntrospectors => &["vhost_vsock", "broker", "introspector"],
            // The vsock device is for the guest endpoint alone.
            Self::Views => &["host", "module", "device", "views", "guest-endpoint"],
            Self::Pages => &["host", "module", "device", "vsock", "memlock", "guest-endpoint"],
            Self::Kvmi => &["vsock"],
        }
    }

    /// A check that must be without a warning.
    fn needs_ok(self) -> Option<&'static str> {
        match self {
            Self::Views => Some("views"),
            Self::Look => Some("broker"),
            _ => None,
        }
    }

    fn judge(self, checks: &[Check], is_root: bool) -> Verdict {
        let needs = self.needs(is_root);
        let needed = |check: &&Check| check.status != Status::Ok && needs.contains(&check.name);
        let mut verdict = Verdict { what: self, status: Status::Ok, see: Vec::new() };
        for check in checks.iter().filter(needed) {
            let is_failure = check.status == Status::Fail || self.needs_ok() == Some(check.name);
            if is_failure {
                verdict.status = Status::Fail;
            } else if verdict.status == Status::Ok {
                verdict.status = Status::Warn;
            }
            if !verdict.see.contains(&check.name) {
                verdict.see.push(check.name);
            }
        }
        verdict
    }
}

/// A verdict for each use of the role. Without the module there are no single pages, and no check
/// of its device is made.
pub(super) fn verdicts(role: Role, checks: &[Check], is_root: bool) -> Vec<Verdict> {
    let has_pages = checks.iter().any(|check| check.name == "device");
    let uses = Use::value_variants().iter().copied().filter(|each| each.role() == role);
    uses.filter(|each| *each != Use::Pages || has_pages)
        .map(|each| each.judge(checks, is_root))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &'static str, status: Status) -> Check {
        Check { name, status, detail: String::new(), remedy: None }
    }

    fn statuses(role: Role, checks: &[Check]) -> Vec<(Use, Status)> {
        verdicts(role, checks, false).iter().map(|verdict| (verdict.what, verdict.status)).collect()
    }

    #[test]
    fn a_host_without_virtualisation_can_be_looked_at() {
        let checks = [
            check("kvm", Status::Fail),
            check("hardware", Status::Fail),
            check("vhost_vsock", Status::Fail),
            check("max_map_count", Status::Ok),
            check("broker", Status::Ok),
        ];
        assert_eq!(
            statuses(Role::Host, &checks),
            [
                (Use::Look, Status::Ok),
                (Use::Targets, Status::Fail),
                (Use::Introspectors, Status::Fail),
                (Use::QemuIntrospectors, Status::Fail),
            ]
        );
        assert_eq!(verdicts(Role::Host, &checks, false)[2].see, ["kvm", "hardware", "vhost_vsock"]);
        // Without a broker root alone can look; targets can be run, as it can be started.
        let broker = [check("broker", Status::Warn)];
        let verdict = Use::Look.judge(&broker, false);
        assert_eq!((verdict.status, verdict.see), (Status::Fail, vec!["broker"]));
        let verdict = Use::Look.judge(&broker, true);
        assert_eq!((verdict.status, verdict.see), (Status::Ok, vec![]));
        assert_eq!(Use::Targets.judge(&broker, true).status, Status::Warn);
    }

    #[test]
    fn a_guest_without_the_module_has_kvmi() {
        let mut checks = vec![
            check("host", Status::Ok),
            check("module", Status::Fail),
            check("device", Status::Fail),
            check("views", Status::Warn),
            check("vsock", Status::Ok),
            check("memlock", Status::Ok),
        ];
        let wanted =
            [(Use::Views, Status::Fail), (Use::Pages, Status::Fail), (Use::Kvmi, Status::Ok)];
        assert_eq!(statuses(Role::Guest, &checks), wanted);
        // A module that knows no views maps pages.
        checks[1].status = Status::Ok;
        checks[2].status = Status::Ok;
        assert_eq!(
            statuses(Role::Guest, &checks)[..2],
            [(Use::Views, Status::Fail), (Use::Pages, Status::Ok)]
        );
        // Tools may do without the module there.
        let without = [check("module", Status::Warn), check("views", Status::Ok)];
        assert_eq!(Use::Views.judge(&without, true).status, Status::Warn);
        // Under a stock QEMU both need that the broker has this virtual machine as an introspector.
        checks[3].status = Status::Ok;
        checks[5] = check("guest-endpoint", Status::Fail);
        let wanted =
            [(Use::Views, Status::Fail), (Use::Pages, Status::Fail), (Use::Kvmi, Status::Ok)];
        assert_eq!(statuses(Role::Guest, &checks), wanted);
        checks[5].status = Status::Ok;
        assert_eq!(statuses(Role::Guest, &checks)[1], (Use::Pages, Status::Ok));
        let without = [check("module", Status::Warn), check("vsock", Status::Ok)];
        assert!(statuses(Role::Guest, &without).iter().all(|(what, _)| *what != Use::Pages));
    }
}
