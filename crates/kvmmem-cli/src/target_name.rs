// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How `--target` names a virtual machine.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;

use kvmmem_qemu::discover::discover;
use kvmmem_qemu::find;

use crate::escape::escape;

/// A virtual machine of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetName {
    /// Its name or UUID.
    Name(String),
    /// Process id of its VMM.
    Pid(u32),
    /// QMP socket of its QEMU.
    Qmp(PathBuf),
    /// What libvirt calls it: its system daemon, or this user's session.
    Libvirt(String),
}

impl FromStr for TargetName {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.split_once(':') {
            Some(("pid", pid)) if pid.parse::<u32>().is_ok() => {
                Self::Pid(pid.parse().unwrap_or_default())
            }
            Some(("qmp", path)) if !path.is_empty() => Self::Qmp(path.into()),
            Some(("libvirt", name)) if !name.is_empty() => Self::Libvirt(name.to_owned()),
            _ => Self::Name(text.to_owned()),
        })
    }
}

impl TargetName {
    /// The process of its VMM; `None` for a name, and where no such virtual machine is found.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Self::Name(_) => None,
            Self::Pid(pid) => Some(*pid),
            Self::Libvirt(name) => find::libvirts(name).ok(),
            Self::Qmp(socket) => {
                let file = std::fs::metadata(socket).ok()?;
                let is_it = |path: &PathBuf| {
                    std::fs::metadata(path)
                        .is_ok_and(|other| (other.dev(), other.ino()) == (file.dev(), file.ino()))
                };
                let mut found = discover().ok()?.into_iter();
                Some(found.find(|vm| vm.qmp.as_ref().is_some_and(is_it))?.pid)
            }
        }
    }

    /// As it is given on the command line.
    pub(crate) fn argument(&self) -> OsString {
        match self {
            Self::Name(name) => name.into(),
            Self::Pid(pid) => format!("pid:{pid}").into(),
            Self::Qmp(path) => [OsStr::new("qmp:"), path.as_os_str()].into_iter().collect(),
            Self::Libvirt(name) => format!("libvirt:{name}").into(),
        }
    }
}

/// The same, for messages.
impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(&escape(name)),
            Self::Pid(pid) => write!(f, "pid:{pid}"),
            Self::Qmp(path) => write!(f, "qmp:{}", escape(&path.to_string_lossy())),
            Self::Libvirt(name) => write!(f, "libvirt:{}", escape(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_the_other_forms() {
        let parse = |text: &str| text.parse::<TargetName>().unwrap();
        assert_eq!(parse("pid:7"), TargetName::Pid(7));
        assert_eq!(parse("qmp:/run/a:b.sock"), TargetName::Qmp("/run/a:b.sock".into()));
        assert_eq!(parse("libvirt:a b"), TargetName::Libvirt("a b".into()));
        for name in ["web-1", "pid:", "pid:x", "pid:-1", "qmp:", "libvirt:", "a:b", ""] {
            assert_eq!(parse(name), TargetName::Name(name.into()), "{name}");
        }
        for text in ["pid:7", "qmp:/run/q", "libvirt:x", "web-1"] {
            assert_eq!(parse(text).to_string(), text);
            assert_eq!(parse(text).argument(), text);
        }
    }
}
