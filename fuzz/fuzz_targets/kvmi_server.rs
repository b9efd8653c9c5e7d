// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes from a tool to the KVMI server, in pieces of any size; every reply has to be
//! well-formed.
#![no_main]

use std::io::{self, Read, Write};
use std::sync::Mutex;

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::dispatch::TargetVm;
use kvmmem_kvmi::handshake::VM_HELLO_SIZE;
use kvmmem_kvmi::message::{HEADER_SIZE, Header};
use kvmmem_kvmi::reply::PhysicalSlot;
use kvmmem_kvmi::server::{Connection, Limits, Turn, Workspace};
use kvmmem_kvmi::token::Token;
use libfuzzer_sys::fuzz_target;

/// A tool that sends what the fuzzer says, at most `piece` bytes at a time.
struct Tool<'a> {
    sends: &'a [u8],
    piece: usize,
    got: Vec<u8>,
}

impl Read for Tool<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(self.piece);
        self.sends.read(&mut buffer[..most])
    }
}

impl Write for Tool<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.got.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A VM with 64 KiB of memory.
struct Vm(Mutex<Vec<u8>>);

impl Vm {
    fn range(gpa: u64, size: usize) -> Result<std::ops::Range<usize>, KvmError> {
        assert!(
            (1..=4096).contains(&size) && gpa % 4096 + size as u64 <= 4096,
            "the server checks transfers"
        );
        let start =
            usize::try_from(gpa).ok().filter(|start| *start < 0x1_0000).ok_or(KvmError::Inval)?;
        Ok(start..start + size)
    }
}

impl TargetVm for Vm {
    fn name(&self) -> &str {
        "fuzz"
    }
    fn uuid(&self) -> [u8; 16] {
        [1; 16]
    }
    fn start_time_ms(&self) -> i64 {
        0
    }
    fn vcpu_count(&self) -> u32 {
        2
    }
    fn max_gfn(&self) -> u64 {
        16
    }
    fn slot(&self, gfn: u64) -> Result<PhysicalSlot, KvmError> {
        if gfn < 16 {
            Ok(PhysicalSlot { gfn: 0.into(), pages: 16.into() })
        } else {
            Err(KvmError::Inval)
        }
    }
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), KvmError> {
        let range = Self::range(gpa, buffer.len())?;
        buffer.copy_from_slice(&self.0.lock().expect("one thread")[range]);
        Ok(())
    }
    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), KvmError> {
        let range = Self::range(gpa, data.len())?;
        self.0.lock().expect("one thread")[range].copy_from_slice(data);
        Ok(())
    }
    fn mint_token(&self) -> Result<Token, KvmError> {
        Ok(Token::new([1, 2, 3, 4]))
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, bytes)) = bytes.split_first() else { return };
    // A proper handshake first, most of the time.
    let hello = [&[24, 0, 0, 0][..], &[0; 20], bytes].concat();
    let sends = if *piece == 0 { bytes } else { &hello };
    let mut tool = Tool { sends, piece: usize::from(*piece).max(1), got: Vec::new() };
    let vm = Vm(Mutex::new(vec![0; 0x1_0000]));
    let mut connection = Connection::new(&vm, Limits::default());
    let mut space = Workspace::default();
    while matches!(connection.turn(&mut tool, &vm, &mut space), Ok(Turn::More)) {}
    let mut rest = &tool.got[VM_HELLO_SIZE..];
    while let Some(header) = Header::parse(rest) {
        let size = usize::from(header.size.get());
        assert!(size >= 8, "a reply starts with its error code");
        let failed = rest[HEADER_SIZE..HEADER_SIZE + 4] != [0; 4];
        assert!(!failed || size == 8, "an error has no payload");
        rest = &rest[HEADER_SIZE + size..];
    }
    assert!(rest.is_empty());
});
