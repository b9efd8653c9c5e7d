// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What udev's rules do on a real system: the project's own, and the usual one for vsock.

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};

use crate::KVMMEM_GID;

/// Node, group and mode.
const RULES: [(&str, u32, u32); 2] = [("/dev/kvmmem", KVMMEM_GID, 0o660), ("/dev/vsock", 0, 0o666)];

/// Applies the rules to the devices that are there.
///
/// devtmpfs makes a node before the module's loading returns, so this is called after each.
pub fn set_permissions() {
    for (node, group, mode) in RULES {
        let set = || -> io::Result<()> {
            chown(node, Some(0), Some(group))?;
            std::fs::set_permissions(node, std::fs::Permissions::from_mode(mode))
        };
        match set() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("kvmmem-guest: {node}: {error}");
            }
            _ => {}
        }
    }
}
