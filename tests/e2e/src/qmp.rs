// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client of QEMU's machine protocol, one connection a command; not the broker's, which is under
//! test.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait::PATIENCE;

/// A connection that is ready for commands.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("QMP {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.line()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// What the command returns. Events meanwhile are passed over.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}").with_context(|| format!("QMP {command}"))?;
        loop {
            let answer = self.line().with_context(|| format!("QMP {command}"))?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
        }
    }

    /// Name of the next event, however long it takes to come.
    pub(crate) fn event(&mut self) -> Result<String> {
        self.stream.get_ref().set_read_timeout(None)?;
        loop {
            if let Some(name) = self.line()?["event"].as_str() {
                return Ok(name.to_owned());
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
