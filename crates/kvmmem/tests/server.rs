// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tool's side of KVMI against the server of crate `kvmmem-kvmi`.

use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use kvmmem::{Endpoint, Listener, Session, SessionError};
use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::dispatch::TargetVm;
use kvmmem_kvmi::reply::PhysicalSlot;
use kvmmem_kvmi::server::serve;
use kvmmem_kvmi::token::Token;

/// A VM with memory from 0x1000 to 0x5000.
struct Vm {
    memory: Mutex<Vec<u8>>,
    tokens: Mutex<u64>,
}

const START: usize = 0x1000;

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

impl Vm {
    fn new() -> Self {
        Self { memory: Mutex::new(vec![0; 0x4000]), tokens: Mutex::new(0) }
    }
}

fn range(gpa: u64, len: usize) -> Result<std::ops::Range<usize>, KvmError> {
    let start = usize::try_from(gpa).unwrap().checked_sub(START).ok_or(KvmError::Inval)?;
    Ok(start..start + len)
}

impl TargetVm for Vm {
    fn name(&self) -> &str {
        "victim"
    }

    fn uuid(&self) -> [u8; 16] {
        [7; 16]
    }

    fn start_time_ms(&self) -> i64 {
        1_700_000_000_000
    }

    fn vcpu_count(&self) -> u32 {
        3
    }

    fn max_gfn(&self) -> u64 {
        5
    }

    fn slot(&self, gfn: u64) -> Result<PhysicalSlot, KvmError> {
        if (1..5).contains(&gfn) {
            Ok(PhysicalSlot { gfn: 1.into(), pages: 4.into() })
        } else {
            Err(KvmError::Inval)
        }
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), KvmError> {
        let memory = self.memory.lock().unwrap();
        buffer.copy_from_slice(memory.get(range(gpa, buffer.len())?).ok_or(KvmError::Inval)?);
        Ok(())
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), KvmError> {
        let mut memory = self.memory.lock().unwrap();
        memory.get_mut(range(gpa, data.len())?).ok_or(KvmError::Inval)?.copy_from_slice(data);
        Ok(())
    }

    fn mint_token(&self) -> Result<Token, KvmError> {
        let mut count = self.tokens.lock().unwrap();
        *count += 1;
        if *count > 2 { Err(KvmError::Again) } else { Ok(Token::new([*count, 2, 3, u64::MAX])) }
    }
}

/// Runs `test` with a session; the server must end well once it is closed.
fn with_session(test: impl FnOnce(&mut Session)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tool.sock");
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).unwrap();
    let server = thread::spawn(move || {
        let stream = UnixStream::connect(path).unwrap();
        serve(&stream, &Vm::new())
    });
    let mut session = listener.accept(PATIENCE).unwrap();
    test(&mut session);
    drop(session);
    server.join().unwrap().unwrap();
}

#[test]
fn the_vm_introduces_itself() {
    with_session(|session| {
        assert_eq!((session.name(), session.uuid()), ("victim", [7; 16]));
        assert_eq!(session.start_time_ms(), 1_700_000_000_000);
        assert_eq!(session.guest_info().unwrap().vcpu_count.get(), 3);
        assert_eq!(session.max_gfn().unwrap(), 5);
    });
}

#[test]
fn a_frame_is_in_a_range_or_in_none() {
    with_session(|session| {
        let slot = session.query_physical(3).unwrap();
        assert_eq!((slot.gfn.get(), slot.pages.get()), (1, 4));
        let error = session.query_physical(5).unwrap_err();
        assert!(matches!(error, SessionError::Refused { error: KvmError::Inval, .. }), "{error:?}");
        assert!(error.to_string().contains("QUERY_PHYSICAL of gfn 0x5"), "{error}");
        assert_eq!(session.query_physical(1).unwrap(), slot);
    });
}

#[test]
fn memory_is_read_and_written_across_pages() {
    with_session(|session| {
        let bytes: Vec<u8> = (0..0x2345).map(|i| u8::try_from(i % 251).unwrap()).collect();
        session.write_physical(0x1abc, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        session.read_physical(0x1abc, &mut back).unwrap();
        assert_eq!(back, bytes);
    });
}

#[test]
fn the_part_before_a_hole_is_read() {
    with_session(|session| {
        session.write_physical(0x4ffc, &[1, 2, 3, 4]).unwrap();
        let mut buffer = [0xff; 8];
        let error = session.read_physical(0x4ffc, &mut buffer).unwrap_err();
        assert!(matches!(error, SessionError::Refused { error: KvmError::Inval, .. }), "{error:?}");
        assert!(error.to_string().contains("gpa 0x5000"), "{error}");
        assert_eq!(buffer, [1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
    });
}

#[test]
fn tokens_come_until_too_many_are_out() {
    with_session(|session| {
        assert_eq!(session.map_token().unwrap().words(), [1, 2, 3, u64::MAX]);
        assert_eq!(session.map_token().unwrap().words(), [2, 2, 3, u64::MAX]);
        let error = session.map_token().unwrap_err();
        assert!(matches!(error, SessionError::Refused { error: KvmError::Again, .. }), "{error:?}");
        assert_eq!(session.max_gfn().unwrap(), 5);
    });
}
