// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Client of QEMU's monitor (QMP), with which checks and benchmarks compare kvmmem.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// How long an answer may take on a busy machine: QEMU writes a dump before it answers.
const LIMIT: Duration = Duration::from_secs(900);

/// A connection. QEMU serves one at a time at each of its sockets.
#[derive(Debug)]
pub(crate) struct Monitor(BufReader<UnixStream>);

impl Monitor {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        writeln!(self.0.get_mut(), "{}", json!({ "execute": command, "arguments": arguments }))?;
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "QEMU has closed its monitor");
            let message: Value = serde_json::from_str(&line)?;
            ensure!(message.get("error").is_none(), "QEMU refuses {command}: {message}");
            // The greeting and events come in between.
            if let Some(answer) = message.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    /// A vCPU's registers, by QEMU's names: RIP, RSP, RFL, CR3 and others.
    pub(crate) fn registers(&mut self, vcpu: usize) -> Result<BTreeMap<String, u64>> {
        let arguments = json!({ "command-line": "info registers", "cpu-index": vcpu });
        let text = self.execute("human-monitor-command", &arguments)?;
        Ok(parse(text.as_str().context("QEMU shows no registers")?))
    }
}

/// `NAME=HEX` of `info registers`; short names are followed by a space.
fn parse(text: &str) -> BTreeMap<String, u64> {
    let text = text.replace(" =", "=");
    let pairs = text.split_whitespace().filter_map(|word| word.split_once('='));
    pairs
        .filter_map(|(name, value)| Some((name.to_owned(), u64::from_str_radix(value, 16).ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_by_their_names() {
        let text = "RSI=00000000000000ff RDI=ff480bb09f418060\r\nR8 =0000000000000007 R10=8\r\n\
                    RIP=ffffffffb10e4b17 RFL=00000046 [---Z-P-] CPL=0\r\nCR0=80050033 CR3=000000001a22a000\r\n";
        let found = parse(text);
        for (name, value) in
            [("R8", 7), ("RIP", 0xffff_ffff_b10e_4b17), ("RFL", 0x46), ("CR3", 0x1a22_a000)]
        {
            assert_eq!(found.get(name), Some(&value), "{name}");
        }
    }
}
