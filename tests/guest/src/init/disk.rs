// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk with whole systems, one a folder, whose programs can be run by chroot.

use std::{fs, io};

use rustix::mount::{MountFlags, mount as mount_device, mount_bind_recursive};

/// The disk.
const DEVICE: &str = "/dev/vda";

/// Where it is mounted.
pub const PLACE: &str = "/disk";

/// What its systems share with this one.
const SHARED: [&str; 5] = ["bed", "dev", "proc", "sys", "tmp"];

/// Mounts the disk, if there is one, read-only; its systems get the devices of this one, `/tmp` and
/// `/bed`.
///
/// # Errors
/// When it is not an ext4 file system with those places in each folder.
pub fn mount() -> io::Result<()> {
    if !fs::exists(DEVICE)? {
        return Ok(());
    }
    fs::create_dir_all(PLACE)?;
    mount_device(DEVICE, PLACE, "ext4", MountFlags::RDONLY, None)?;
    for system in fs::read_dir(PLACE)? {
        let system = system?;
        for name in SHARED {
            let place = system.path().join(name);
            // Folders without a system, as the file system's own, have none of these places.
            if fs::exists(&place)? {
                mount_bind_recursive(format!("/{name}"), &place)?;
            }
        }
    }
    Ok(())
}
