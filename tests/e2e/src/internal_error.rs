// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Internal errors of KVM in VMs under a stock QEMU.
//!
//! QEMU prints such an error, stops the VM's vCPUs and keeps running. [`watch`] ends it instead:
//! the connections to the guest's agent close, and a scenario fails at once and not after the limit
//! of each wait. [`reason`] is for the report. kvmmem-vmm ends by itself.

use std::path::Path;
use std::thread;

use anyhow::Result;
use serde_json::json;

use crate::qmp::Qmp;

/// What QEMU prints first.
const BEGIN: &str = "KVM internal error.";

/// Ends the QEMU of this QMP socket as soon as an internal error has stopped its guest. The socket
/// is used up.
pub(crate) fn watch(socket: &Path) -> Result<()> {
    let mut qmp = Qmp::connect(socket)?;
    // The thread ends with QEMU, which closes the connection.
    thread::spawn(move || -> Result<()> {
        loop {
            if qmp.event()? == "STOP"
                && qmp.execute("query-status", &json!({}))?["status"] == "internal-error"
            {
                qmp.execute("quit", &json!({}))?;
            }
        }
    });
    Ok(())
}

/// The last internal error in QEMU's log, without the registers.
pub(crate) fn reason(log: &str) -> Option<String> {
    let (_, text) = log.rsplit_once(BEGIN)?;
    let mut lines = text.lines();
    let first = format!("{BEGIN}{}", lines.next().unwrap_or_default());
    let data = lines.take_while(|line| line.starts_with("extra data["));
    Some(std::iter::once(first.as_str()).chain(data).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From QEMU 11.1 (`kvm_handle_internal_error`), where a guest stored to a read-only view.
    const LOG: &str = "\
KVM internal error. Suberror: 3
extra data[0]: 0x000000c402f69000
extra data[1]: 0x0000000000000400
extra data[2]: 0x0000000100000007
extra data[3]: 0x000000c402f69000
extra data[4]: 0x0000000000000000
RAX=0000000000000000 RBX=00007f22dca04000 RCX=000000000044df07 RDX=0000000000000004
";

    #[test]
    fn an_internal_error_is_found_with_its_data() {
        let wanted = "KVM internal error. Suberror: 3, extra data[0]: 0x000000c402f69000, \
            extra data[1]: 0x0000000000000400, extra data[2]: 0x0000000100000007, \
            extra data[3]: 0x000000c402f69000, extra data[4]: 0x0000000000000000";
        assert_eq!(reason(LOG).as_deref(), Some(wanted));
        let later = format!("{LOG}KVM internal error. Suberror: 1\nemulation failure\n");
        assert_eq!(reason(&later).as_deref(), Some("KVM internal error. Suberror: 1"));
        assert_eq!(reason("KVM internal error.").as_deref(), Some("KVM internal error."));
        assert_eq!(reason("qemu-system-x86_64: terminating on signal 15\n"), None);
    }
}
