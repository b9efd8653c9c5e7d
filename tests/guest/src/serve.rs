// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The agent: serves one request per connection.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::channel::{Channel, send};
use crate::frame::{Kind, MAX_PAYLOAD};
use crate::init::{device, module};
use crate::request::{Command, Failure, Reply, Request};
use crate::{AGENT_PORT, process};

/// Connections served at once; more are closed.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take for its request, and for each piece of a file.
const PATIENCE: Duration = Duration::from_secs(30);

/// Largest file that may be put, in bytes.
const MAX_FILE: u64 = 512 << 20;

/// Serves connections until a client asks for power-off.
///
/// # Errors
/// When the vsock port cannot be listened on.
pub fn serve() -> io::Result<()> {
    static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, AGENT_PORT)?;
    loop {
        let socket = match listener.accept() {
            Ok((stream, _)) => OwnedFd::from(stream),
            Err(error) => {
                eprintln!("kvmmem-guest: accept: {error}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if CONNECTIONS.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
            eprintln!("kvmmem-guest: more than {MAX_CONNECTIONS} connections: one refused");
            continue;
        }
        thread::spawn(move || {
            if let Err(error) = connection(Channel::new(socket)) {
                eprintln!("kvmmem-guest: connection: {error}");
            }
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Serves the one request of a connection.
///
/// # Errors
/// When the client does not speak the protocol or goes away.
pub fn connection(mut channel: Channel) -> io::Result<()> {
    channel.set_write_timeout(PATIENCE)?;
    let Some(frame) = channel.receive(deadline())? else { return Ok(()) };
    if frame.kind != Kind::Request {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the first frame is no request"));
    }
    let result = match serde_json::from_slice(&frame.payload)? {
        Request::Exec(command) => return exec(channel, &command),
        Request::Put { path, mode, length } => put(&mut channel, Path::new(&path), mode, length),
        Request::Get { path } => get(&mut channel, &path),
        Request::LoadModule { path, parameters } => {
            let result = module::load(Path::new(&path), &parameters);
            device::set_permissions();
            result
        }
        Request::UnloadModule { name } => module::unload(&name),
        Request::Poweroff {} => {
            reply(&mut channel, Ok(()))?;
            return crate::init::power_off();
        }
    };
    reply(&mut channel, result)
}

fn deadline() -> Option<Instant> {
    Instant::now().checked_add(PATIENCE)
}

fn reply(channel: &mut Channel, result: io::Result<()>) -> io::Result<()> {
    let reply = Reply { error: result.err().map(Failure::from) };
    channel.send(Kind::Reply, &serde_json::to_vec(&reply)?)
}

/// Runs a program, and ends it and what it started when the client goes away.
fn exec(mut channel: Channel, command: &Command) -> io::Result<()> {
    let sink = Arc::new(Mutex::new(channel.writer()?));
    let running = match process::start(command, &sink) {
        Ok(running) => running,
        Err(error) => return reply(&mut channel, Err(error)),
    };
    let handle = running.handle();
    let waiter = thread::spawn(move || -> io::Result<()> {
        let status = running.wait()?;
        send(&sink, Kind::Exit, &serde_json::to_vec(&status)?)
    });
    // Its children may outlive it, so they end when the client closes the connection.
    let served = loop {
        match channel.receive(None) {
            Ok(None) => break Ok(()),
            Ok(Some(frame)) => {
                let done = match (frame.kind, frame.payload.first_chunk()) {
                    (Kind::Stdin, _) => handle.feed(frame.payload),
                    (Kind::Signal, Some(number)) => handle.signal(i32::from_le_bytes(*number)),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                };
                if let Err(error) = done {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    handle.kill_all()?;
    // It has ended. A client that left gets no answer, which is not an error.
    drop(waiter.join());
    handle.reap()?;
    // The client waits for this: what its program held is released.
    channel.shutdown();
    match served {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(()),
    }
}

fn put(channel: &mut Channel, path: &Path, mode: u32, length: u64) -> io::Result<()> {
    if length > MAX_FILE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Removed first: the old file may be a program that runs.
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode & 0o7777).open(path)?;
    let mut left = length;
    while left > 0 {
        let frame = channel.receive(deadline())?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let size = u64::try_from(frame.payload.len()).unwrap_or(u64::MAX);
        if frame.kind != Kind::Data || size == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        left = left.checked_sub(size).ok_or(io::ErrorKind::InvalidData)?;
        file.write_all(&frame.payload)?;
    }
    Ok(())
}

fn get(channel: &mut Channel, path: &str) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; MAX_PAYLOAD];
    loop {
        match file.read(&mut bytes)? {
            0 => return Ok(()),
            length => channel.send(Kind::Data, bytes.get(..length).unwrap_or_default())?,
        }
    }
}
