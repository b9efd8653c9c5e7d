// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of QEMU's monitor: its own dump, which `kvmmem dump` is compared with, and where else the monitor listens.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// A monitor by TCP, at a port of the kernel's choice, as QEMU's option has it and as QEMU shows it.
pub(super) const TCP: &str = "tcp:127.0.0.1:0,server=on,wait=off";
const SHOWN: &str = "tcp:127.0.0.1:";

/// Dumps a guest's memory to `file` by the monitor at `socket`; returns when the file is complete.
pub(super) fn dump_guest_memory(socket: &Path, file: &Path) -> Result<()> {
    let protocol = format!("file:{}", file.display());
    let arguments = json!({"paging": false, "protocol": protocol});
    ask(socket, &json!({"execute": "dump-guest-memory", "arguments": arguments})).map(drop)
}

/// The address of the monitor by TCP.
pub(super) fn tcp_address(socket: &Path) -> Result<String> {
    let devices = ask(socket, &json!({"execute": "query-chardev"}))?;
    let port = devices.as_array().into_iter().flatten().find_map(|device| {
        let (_, port) = device["filename"].as_str()?.split_once(SHOWN)?;
        port.split(|letter: char| !letter.is_ascii_digit()).next()
    });
    Ok(format!("127.0.0.1:{}", port.context("QEMU has no monitor by TCP")?))
}

/// Executes a command.
fn ask(socket: &Path, command: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to QEMU's monitor {}", socket.display()))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut answer = Value::Null;
    for command in [&json!({"execute": "qmp_capabilities"}), command] {
        writeln!(stream, "{command}")?;
        answer = loop {
            let line = lines.next().context("QEMU closed its monitor")??;
            let mut message: Value = serde_json::from_str(&line)?;
            if message.get("error").is_some() {
                bail!("{command} failed: {message}");
            }
            if let Some(answer) = message.get_mut("return") {
                break answer.take();
            }
        };
    }
    Ok(answer)
}
