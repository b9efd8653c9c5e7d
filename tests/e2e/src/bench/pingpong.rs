// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A KVMI read of 4 KiB against two threads that pass the same number of bytes to and fro over the same kind of socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use kvmmem::{Endpoint, Listener};
use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::server;
use kvmmem_sys::ram::GuestRam;

/// Bytes of a READ_PHYSICAL request, header and all.
const REQUEST: usize = 24;
/// Bytes of its reply, header, error code and page.
const REPLY: usize = 8 + 8 + 4096;

/// `rounds` times of each: KVMI reads, ping-pongs.
pub(crate) fn compare(rounds: usize) -> Result<(Vec<u64>, Vec<u64>)> {
    Ok((kvmi(rounds)?, bare(rounds)?))
}

fn bare(rounds: usize) -> Result<Vec<u64>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("ping");
    let listener = UnixListener::bind(&path)?;
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let mut stream = UnixStream::connect(path)?;
        let (mut request, reply) = ([0; REQUEST], [0x5a; REPLY]);
        while stream.read_exact(&mut request).is_ok() {
            stream.write_all(&reply)?;
        }
        Ok(())
    });
    let (mut stream, _) = listener.accept()?;
    let (request, mut reply) = ([0; REQUEST], [0; REPLY]);
    let times = timed(rounds, || {
        stream.write_all(&request)?;
        Ok(stream.read_exact(&mut reply)?)
    })?;
    drop(stream);
    server.join().map_err(|_| anyhow!("the ping-pong's thread died"))??;
    Ok(times)
}

fn kvmi(rounds: usize) -> Result<Vec<u64>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("kvmi");
    let listener = Listener::bind(&Endpoint::Unix(path.clone()))?;
    let ram = GuestRam::new(16 << 20)?;
    let server = std::thread::spawn(move || -> Result<()> {
        let mut stream = UnixStream::connect(path)?;
        Ok(server::serve(&mut stream, &Still(ram), || ())?)
    });
    let mut session = listener.accept(Duration::from_secs(10))?;
    let mut page = [0; 4096];
    let times = timed(rounds, || Ok(session.read_physical(0x10_0000, &mut page)?))?;
    drop(session);
    server.join().map_err(|_| anyhow!("the server's thread died"))??;
    Ok(times)
}

/// Times `act`, after as many rounds that do not count.
fn timed(rounds: usize, mut act: impl FnMut() -> Result<()>) -> Result<Vec<u64>> {
    for _ in 0..rounds {
        act()?;
    }
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            act()?;
            u64::try_from(start.elapsed().as_nanos()).context("a long time")
        })
        .collect()
}

/// A VM that only has memory.
struct Still(GuestRam);

impl kvmmem_kvmi::dispatch::Introspected for Still {
    fn name(&self) -> &'static str {
        "still"
    }

    fn uuid(&self) -> [u8; 16] {
        [1; 16]
    }

    fn start_time_ms(&self) -> i64 {
        0
    }

    fn vcpu_count(&self) -> u32 {
        1
    }

    fn max_gfn(&self) -> u64 {
        (16 << 20) / 4096
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), KvmError> {
        rustix::io::pread(self.0.fd(), buffer, gpa).map(drop).map_err(|_| KvmError::Inval)
    }

    fn write(&self, _gpa: u64, _data: &[u8]) -> Result<(), KvmError> {
        Err(KvmError::Inval)
    }

    fn mint_token(&self) -> Result<kvmmem_kvmi::token::Token, KvmError> {
        Err(KvmError::Again)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_sides_answer() {
        let (read, ping) = super::compare(500).unwrap();
        assert_eq!((read.len(), ping.len()), (500, 500));
    }
}
