// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's file systems.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// Type, place and options of each.
const MOUNTS: [(&str, &str, Option<&CStr>); 9] = [
    ("proc", "/proc", None),
    ("sysfs", "/sys", None),
    ("devtmpfs", "/dev", None),
    ("devpts", "/dev/pts", Some(c"mode=0620,ptmxmode=0666")),
    ("tmpfs", "/dev/shm", Some(c"mode=1777")),
    ("tmpfs", "/tmp", Some(c"mode=1777")),
    ("tmpfs", "/run", Some(c"mode=0755")),
    ("debugfs", "/sys/kernel/debug", None),
    ("securityfs", "/sys/kernel/security", None),
];

/// Mounts them all.
///
/// # Errors
/// When one cannot be mounted, with its place.
pub fn mount_all() -> io::Result<()> {
    for (kind, place, options) in MOUNTS {
        // A place inside sysfs exists already and cannot be made.
        if !fs::exists(place)? {
            fs::create_dir_all(place)?;
        }
        let flags = MountFlags::NOSUID
            | if kind == "tmpfs" { MountFlags::NODEV } else { MountFlags::empty() };
        match mount(kind, place, kind, flags, options) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => {
                return Err(io::Error::other(format!("mount {kind} on {place}: {error}")));
            }
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
    ] {
        if !fs::exists(link)? {
            symlink(target, link)?;
        }
    }
    Ok(())
}
