// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of QEMU's monitor: its own dump, which `kvmmem dump` is compared with, and where
//! else the monitor listens.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::monitor::Monitor;

/// A monitor by TCP, at a port of the kernel's choice, as QEMU's option has it and as QEMU shows
/// it.
pub(super) const TCP: &str = "tcp:127.0.0.1:0,server=on,wait=off";
const SHOWN: &str = "tcp:127.0.0.1:";

/// Dumps a guest's memory to `file` by one of its monitors; returns when the file is complete.
pub(super) fn dump_guest_memory(monitor: &mut Monitor, file: &Path) -> Result<()> {
    let protocol = format!("file:{}", file.display());
    let arguments = json!({"paging": false, "protocol": protocol});
    monitor.execute("dump-guest-memory", &arguments).map(drop)
}

/// The address of the monitor by TCP.
pub(super) fn tcp_address(socket: &Path) -> Result<String> {
    let devices = Monitor::connect(socket)?.execute("query-chardev", &json!({}))?;
    let port = devices.as_array().into_iter().flatten().find_map(|device| {
        let (_, port) = device["filename"].as_str()?.split_once(SHOWN)?;
        port.split(|letter: char| !letter.is_ascii_digit()).next()
    });
    Ok(format!("127.0.0.1:{}", port.context("QEMU has no monitor by TCP")?))
}
