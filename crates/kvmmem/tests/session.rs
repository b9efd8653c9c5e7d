// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tool's side of KVMI against a scripted VM's side over a unix socket, well-behaved and not.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvmmem::{Endpoint, Listener, ListenerError, Session, SessionError};
use kvmmem_abi::errno::KvmError;
use proptest::prelude::*;

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

const UUID: [u8; 16] = *b"0123456789abcdef";
const MEMORY: usize = 4 * 4096;

/// What the VM's side does with a request: returns the bytes to send.
type Script = Box<dyn FnMut(&Question) -> Vec<u8> + Send>;

struct Question {
    id: u16,
    seq: u32,
    payload: Vec<u8>,
}

impl Question {
    fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.payload[offset..offset + 8].try_into().unwrap())
    }

    fn reply(&self, err: i32, data: &[u8]) -> Vec<u8> {
        message(self.id, self.seq, &[&err.to_le_bytes(), &[0; 4][..], data].concat())
    }
}

fn message(id: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
    let size = u16::try_from(payload.len()).unwrap();
    [&id.to_le_bytes()[..], &size.to_le_bytes(), &seq.to_le_bytes(), payload].concat()
}

fn hello(size: u32) -> Vec<u8> {
    let mut bytes = vec![0; size.max(96) as usize];
    bytes[..4].copy_from_slice(&size.to_le_bytes());
    bytes[4..20].copy_from_slice(&UUID);
    bytes[24..32].copy_from_slice(&1_700_000_000_123i64.to_le_bytes());
    bytes[32..38].copy_from_slice(b"victim");
    bytes.truncate(size as usize);
    bytes
}

/// Connects as a VM's side does, and answers by `script` until the tool hangs up.
fn serve(path: &Path, hello: Vec<u8>, mut script: Script) -> JoinHandle<()> {
    let path = path.to_owned();
    thread::spawn(move || {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(&hello).unwrap();
        let mut tool = [0; 24];
        if stream.read_exact(&mut tool).is_err() {
            return;
        }
        assert_eq!(tool[..4], 24u32.to_le_bytes());
        let mut header = [0; 8];
        while stream.read_exact(&mut header).is_ok() {
            let size = u16::from_le_bytes([header[2], header[3]]);
            let mut payload = vec![0; usize::from(size)];
            stream.read_exact(&mut payload).unwrap();
            let question = Question {
                id: u16::from_le_bytes([header[0], header[1]]),
                seq: u32::from_le_bytes(header[4..].try_into().unwrap()),
                payload,
            };
            let answer = script(&question);
            if answer.is_empty() {
                return;
            }
            // Half a message is the last thing that is sent.
            let is_whole =
                answer.len() >= 8 + usize::from(u16::from_le_bytes([answer[2], answer[3]]));
            if stream.write_all(&answer).is_err() || !is_whole {
                return;
            }
        }
    })
}

/// A VM with four pages of memory, all as the protocol has it.
fn memory() -> Script {
    let mut memory = vec![0u8; MEMORY];
    Box::new(move |question| match question.id {
        2 => question.reply(0, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        5 => question.reply(0, &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        17 | 18 => {
            let (gpa, size) = (question.u64_at(0), question.u64_at(8));
            assert!(
                size >= 1 && gpa % 4096 + size <= 4096,
                "gpa {gpa:#x} size {size:#x} crosses a page"
            );
            let start = usize::try_from(gpa).unwrap();
            let end = start.saturating_add(usize::try_from(size).unwrap());
            match memory.get_mut(start..end) {
                None => question.reply(-22, &[]),
                Some(place) if question.id == 17 => question.reply(0, place),
                Some(place) => {
                    place.copy_from_slice(&question.payload[16..]);
                    question.reply(0, &[])
                }
            }
        }
        22 => question.reply(0, &(0..32).collect::<Vec<u8>>()),
        29 => question.reply(0, &3u64.to_le_bytes()),
        _ => question.reply(-95, &[]),
    })
}

/// Answers GET_VERSION properly and everything else by `rest`.
fn after_version(mut rest: impl FnMut(&Question) -> Vec<u8> + Send + 'static) -> Script {
    let mut sane = memory();
    Box::new(move |question| if question.id == 2 { sane(question) } else { rest(question) })
}

fn listen() -> (tempfile::TempDir, std::path::PathBuf, Listener) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tool.sock");
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).unwrap();
    (dir, path, listener)
}

fn session(script: Script) -> Session {
    let (_dir, path, listener) = listen();
    let _server = serve(&path, hello(96), script);
    listener.accept(PATIENCE).unwrap()
}

#[test]
fn a_session_knows_whom_it_talks_to() {
    let mut session = session(memory());
    assert_eq!((session.name(), session.uuid()), ("victim", UUID));
    assert_eq!(session.start_time_ms(), 1_700_000_000_123);
    assert_eq!(session.version().version.get(), 1);
    assert_eq!(session.guest_info().unwrap().vcpu_count.get(), 2);
    assert_eq!(session.max_gfn().unwrap(), 3);
    let token = session.map_token().unwrap();
    assert_eq!(token.to_bytes().to_vec(), (0..32).collect::<Vec<u8>>());
}

#[test]
fn longer_and_shorter_hellos_are_taken() {
    for size in [32, 104, 4096] {
        let (_dir, path, listener) = listen();
        let _server = serve(&path, hello(size), memory());
        let session = listener.accept(PATIENCE).unwrap();
        assert_eq!(session.uuid(), UUID, "{size}");
    }
}

#[test]
fn bad_hellos_are_refused() {
    for size in [0u32, 4, 31, 64 * 1024 + 1, u32::MAX] {
        let (_dir, path, listener) = listen();
        let _server = serve(&path, size.to_le_bytes().to_vec(), memory());
        let error = listener.accept(PATIENCE).unwrap_err();
        assert!(
            matches!(error, ListenerError::Session { source: SessionError::Handshake(_), .. }),
            "{size}: {error:?}"
        );
    }
}

#[test]
fn reads_and_writes_are_split_at_page_borders() {
    let mut session = session(memory());
    let bytes: Vec<u8> = (0..9000).map(|i| u8::try_from(i % 253).unwrap()).collect();
    session.write_physical(0xffd, &bytes).unwrap();
    let mut back = vec![0; bytes.len() + 2];
    session.read_physical(0xffc, &mut back).unwrap();
    assert_eq!(back[0], 0);
    assert_eq!(back[1..=bytes.len()], bytes);
    assert_eq!(back[bytes.len() + 1], 0);
}

#[test]
fn an_error_reply_leaves_the_session_usable() {
    let mut session = session(memory());
    let error = session.read_physical(0x100_0000, &mut [0; 8]).unwrap_err();
    let SessionError::Refused { error: kvm, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*kvm, KvmError::Inval);
    let text = error.to_string();
    assert!(text.contains("gpa 0x1000000") && text.contains("EINVAL"), "{text}");
    assert_eq!(session.max_gfn().unwrap(), 3);
}

#[test]
fn ranges_past_the_end_of_the_address_space_are_refused() {
    let mut session = session(memory());
    let error = session.read_physical(u64::MAX - 6, &mut [0; 8]).unwrap_err();
    assert!(matches!(error, SessionError::Range { .. }), "{error:?}");
    // The last byte is a place like any other; this target just has no memory there.
    let error = session.write_physical(u64::MAX, &[0]).unwrap_err();
    assert!(matches!(error, SessionError::Refused { .. }), "{error:?}");
}

#[test]
fn events_before_the_reply_are_passed_over() {
    let mut session = session(after_version(|question| {
        let event = message(1, 77, &[0xaa; 560]);
        [event.clone(), event, question.reply(0, &9u64.to_le_bytes())].concat()
    }));
    assert_eq!(session.max_gfn().unwrap(), 9);
    assert_eq!(session.max_gfn().unwrap(), 9);
}

#[test]
fn an_answer_to_another_question_ends_the_session() {
    for twist in [
        |q: &Question| message(q.id, q.seq + 1, &[0; 16]),
        |q: &Question| message(q.id + 1, q.seq, &[0; 16]),
    ] {
        let mut session = session(after_version(twist));
        let error = session.max_gfn().unwrap_err();
        assert!(matches!(error, SessionError::Answer { .. }), "{error:?}");
        assert!(matches!(session.max_gfn(), Err(SessionError::Over { .. })));
    }
}

#[test]
fn broken_answers_end_the_session() {
    type Answer = fn(&Question) -> Vec<u8>;
    let cases: [(&str, Answer); 5] = [
        ("closed", |_| Vec::new()),
        ("cut", |q| q.reply(0, &[0; 8])[..11].to_vec()),
        ("no error code", |q| message(q.id, q.seq, &[0; 3])),
        ("unknown error", |q| q.reply(-5, &[])),
        ("too large", |q| [&q.id.to_le_bytes()[..], &[0xff; 2], &q.seq.to_le_bytes()].concat()),
    ];
    for (name, answer) in cases {
        let mut session = session(after_version(answer));
        assert!(session.max_gfn().is_err(), "{name}");
        assert!(matches!(session.max_gfn(), Err(SessionError::Over { .. })), "{name}");
    }
}

#[test]
fn a_short_read_is_no_success() {
    let mut session = session(after_version(|question| question.reply(0, &[1, 2, 3])));
    let error = session.read_physical(0, &mut [0; 4]).unwrap_err();
    assert!(matches!(error, SessionError::Answer { size: 3, .. }), "{error:?}");
}

#[test]
fn version_zero_is_refused() {
    let (_dir, path, listener) = listen();
    let _server = serve(&path, hello(96), Box::new(|question| question.reply(0, &[0; 8])));
    let error = listener.accept(PATIENCE).unwrap_err();
    assert!(
        matches!(error, ListenerError::Session { source: SessionError::Version { found: 0 }, .. }),
        "{error:?}"
    );
}

#[test]
fn waiting_ends_in_time_and_names_the_remedy() {
    let (_dir, _path, listener) = listen();
    let start = Instant::now();
    let error = listener.accept(Duration::from_millis(50)).unwrap_err();
    assert!(start.elapsed() < PATIENCE);
    assert!(error.to_string().contains("kvmmem hook add"), "{error}");
}

#[test]
fn a_taken_path_is_an_error_and_a_dropped_one_is_free_again() {
    let (_dir, path, listener) = listen();
    let error = Listener::bind(&Endpoint::Unix(path.clone())).unwrap_err();
    assert!(error.to_string().contains("remove it"), "{error}");
    drop(listener);
    Listener::bind(&Endpoint::Unix(path)).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_as_answer_are_an_error_or_a_value(mut bytes in proptest::collection::vec(any::<u8>(), 1..600)) {
        let mut sent = false;
        let mut session = session(after_version(move |question| {
            if std::mem::replace(&mut sent, true) {
                return Vec::new();
            }
            // Often enough the header fits, so that what is behind it is looked at.
            if bytes.len() >= 8 && bytes[0] % 2 == 0 {
                let size = u16::try_from(bytes.len() - 8).unwrap();
                bytes[..2].copy_from_slice(&question.id.to_le_bytes());
                bytes[2..4].copy_from_slice(&size.to_le_bytes());
                bytes[4..8].copy_from_slice(&question.seq.to_le_bytes());
            } else {
                // A message that says it is longer would be waited for: keep it whole.
                bytes.resize(8.max(bytes.len()), 0);
                let size = u16::try_from(bytes.len() - 8).unwrap();
                bytes[2..4].copy_from_slice(&size.to_le_bytes());
                // No event: another answer would be waited for.
                bytes[0] = 3;
            }
            bytes.clone()
        }));
        let _ = session.max_gfn();
        let _ = session.max_gfn();
    }
}
