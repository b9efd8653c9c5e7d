// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the project's udev rule does on a real system.

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};

use crate::KVMMEM_GID;

/// The introspector's device.
const DEVICE: &str = "/dev/kvmmem";

/// Gives the device, if it is there, to group `kvmmem` with mode 0660.
///
/// devtmpfs makes the node before the module's loading returns, so this is called after each.
pub fn set_permissions() {
    let set = || -> io::Result<()> {
        chown(DEVICE, Some(0), Some(KVMMEM_GID))?;
        std::fs::set_permissions(DEVICE, std::fs::Permissions::from_mode(0o660))
    };
    match set() {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("kvmmem-guest: {DEVICE}: {error}");
        }
        _ => {}
    }
}
