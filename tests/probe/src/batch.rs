// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A KVMI tool that sends what libkvmi does, byte for byte, and more than the host offers: each
//! message must be answered as libkvmi expects it, or a tool is out of step for good.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::step;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

const EVENT_REPLY: u16 = 0;
const GET_VERSION: u16 = 2;
const PAUSE_VCPU: u16 = 7;
const CONTROL_CMD_RESPONSE: u16 = 27;

/// What a command that is not offered is refused with: KVM_EOPNOTSUPP.
const NOT_OFFERED: i32 = -95;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The vsock port to listen on for the host.
    #[arg(long)]
    port: u32,
}

/// Command, sequence number and error of a reply.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    id: u16,
    seq: u32,
    error: i32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut tool = None;
    step("the host connects and shakes hands", || {
        tool = Some(Tool::accept(arguments.port)?);
        Ok((true, String::new()))
    })?;
    let mut tool = tool.context("no connection: nothing more can be tried")?;

    step("a batch with a command that is not offered is answered once, by its refusal", || {
        // kvmi_pause_all_vcpus() of a VM with one vCPU.
        let batch = [replies(false, 100), message(PAUSE_VCPU, 101, &[0; 16]), replies(true, 102)];
        tool.send(&batch.concat())?;
        is(&tool.reply()?, CONTROL_CMD_RESPONSE, 102, NOT_OFFERED)
    })?;
    step("what is asked next is answered next", || {
        tool.send(&message(GET_VERSION, 103, &[]))?;
        is(&tool.reply()?, GET_VERSION, 103, 0)
    })?;
    step("alone, such a command is refused", || {
        tool.send(&message(PAUSE_VCPU, 104, &[0; 16]))?;
        is(&tool.reply()?, PAUSE_VCPU, 104, NOT_OFFERED)
    })?;
    step("a batch without one is answered once, by success", || {
        tool.send(&[replies(false, 105), replies(true, 106)].concat())?;
        is(&tool.reply()?, CONTROL_CMD_RESPONSE, 106, 0)
    })?;
    step("a reply to an event is never answered", || {
        tool.send(&[message(EVENT_REPLY, 107, &[0; 16]), message(GET_VERSION, 108, &[])].concat())?;
        is(&tool.reply()?, GET_VERSION, 108, 0)
    })?;
    Ok(())
}

fn is(reply: &Reply, id: u16, seq: u32, error: i32) -> Result<(bool, String)> {
    Ok((*reply == Reply { id, seq, error }, format!("{reply:?}")))
}

fn message(id: u16, seq: u32, body: &[u8]) -> Vec<u8> {
    let size = u16::try_from(body.len()).unwrap_or(u16::MAX);
    [&id.to_le_bytes()[..], &size.to_le_bytes(), &seq.to_le_bytes(), body].concat()
}

/// Switches the replies on or off, this message's own included.
fn replies(enable: bool, seq: u32) -> Vec<u8> {
    message(CONTROL_CMD_RESPONSE, seq, &[u8::from(enable), 1, 0, 0, 0, 0, 0, 0])
}

struct Tool(VsockStream);

impl Tool {
    fn accept(port: u32) -> Result<Self> {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
        listener.set_nonblocking(true)?;
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error)
                    if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(error).context("the host did not connect"),
            }
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut tool = Self(stream);
        // The VM's hello begins with its size; the tool's has no cookie.
        let size = u32::from_le_bytes(tool.take()?);
        ensure!((4..=4096).contains(&size), "the host's hello has {size} bytes");
        tool.0.read_exact(&mut vec![0; usize::try_from(size)? - 4])?;
        let mut hello = [0; 24];
        hello[0] = 24;
        tool.send(&hello)?;
        Ok(tool)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write_all(bytes).context("cannot send")
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).context("no reply")?;
        Ok(bytes)
    }

    fn reply(&mut self) -> Result<Reply> {
        let [a, b, c, d, rest @ ..] = self.take::<8>()?;
        let mut body = vec![0; u16::from_le_bytes([c, d]).into()];
        self.0.read_exact(&mut body).context("no reply")?;
        let error = body.first_chunk().context("the reply has no error code")?;
        Ok(Reply {
            id: u16::from_le_bytes([a, b]),
            seq: u32::from_le_bytes(rest),
            error: i32::from_le_bytes(*error),
        })
    }
}
