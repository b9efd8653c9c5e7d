// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server over a unix socket, byte by byte, and against anything that a tool may send.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::dispatch::{Dispatcher, ReplyBuffer, TargetVm};
use kvmmem_kvmi::message::Header;
use kvmmem_kvmi::reply::{PhysicalSlot, Version};
use kvmmem_kvmi::request::Request;
use kvmmem_kvmi::server::{Connection, Limits, ServeError, Socket, Turn, Workspace};
use kvmmem_kvmi::server::{serve, serve_within};
use kvmmem_kvmi::token::Token;
use proptest::prelude::*;
use zerocopy::IntoBytes;

/// A VM with two vCPUs and the pages 0 and 2, which gives out three tokens.
struct Vm {
    pages: Mutex<[[u8; 4096]; 2]>,
    tokens: Mutex<u64>,
}

impl Default for Vm {
    fn default() -> Self {
        Self { pages: Mutex::new([[0x5a; 4096]; 2]), tokens: Mutex::default() }
    }
}

impl Vm {
    fn place(gpa: u64) -> Result<(usize, usize), KvmError> {
        let page = match gpa >> 12 {
            0 => 0,
            2 => 1,
            _ => return Err(KvmError::Inval),
        };
        Ok((page, usize::try_from(gpa & 0xfff).unwrap()))
    }
}

impl TargetVm for Vm {
    fn name(&self) -> &str {
        "tiger"
    }
    fn uuid(&self) -> [u8; 16] {
        *b"0123456789abcdef"
    }
    fn start_time_ms(&self) -> i64 {
        1_700_000_000_000
    }
    fn vcpu_count(&self) -> u32 {
        2
    }
    fn max_gfn(&self) -> u64 {
        3
    }
    fn slot(&self, gfn: u64) -> Result<PhysicalSlot, KvmError> {
        Self::place(gfn.checked_mul(4096).ok_or(KvmError::Inval)?)?;
        Ok(PhysicalSlot { gfn: gfn.into(), pages: 1.into() })
    }
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), KvmError> {
        let (page, at) = Self::place(gpa)?;
        buffer.copy_from_slice(&self.pages.lock().unwrap()[page][at..at + buffer.len()]);
        Ok(())
    }
    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), KvmError> {
        let (page, at) = Self::place(gpa)?;
        self.pages.lock().unwrap()[page][at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn mint_token(&self) -> Result<Token, KvmError> {
        let mut tokens = self.tokens.lock().unwrap();
        if *tokens == 3 {
            return Err(KvmError::Again);
        }
        *tokens += 1;
        Ok(Token::new([*tokens, 2, 3, 4]))
    }
}

/// Serves a VM; returns what the tool got after the handshake, and how the connection ended for the
/// server.
fn talk(requests: &[u8]) -> (Vec<u8>, Result<(), ServeError>) {
    let (ours, mut tools) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(move || serve(&ours, &Vm::default()));
        let mut hello = [0; 96];
        tools.read_exact(&mut hello).unwrap();
        assert_eq!(&hello[32..38], b"tiger\0");
        let mut answer = [0; 24];
        answer[0] = 24;
        tools.write_all(&answer).unwrap();
        // The server may close before it has read everything.
        let _ = tools.write_all(requests);
        let _ = tools.shutdown(Shutdown::Write);
        let mut replies = Vec::new();
        let _ = tools.read_to_end(&mut replies);
        (replies, server.join().unwrap())
    })
}

fn message(id: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
    let size = u16::try_from(payload.len()).unwrap();
    [&id.to_le_bytes(), &size.to_le_bytes(), &seq.to_le_bytes()[..], payload].concat()
}

fn reply(id: u16, seq: u32, err: i32, data: &[u8]) -> Vec<u8> {
    message(id, seq, &[&err.to_le_bytes()[..], &[0; 4], data].concat())
}

fn control(seq: u32, enable: bool, now: bool) -> Vec<u8> {
    message(27, seq, &[enable.into(), now.into(), 0, 0, 0, 0, 0, 0])
}

fn physical(gpa: u64, size: u64) -> Vec<u8> {
    [gpa.to_le_bytes(), size.to_le_bytes()].concat()
}

#[track_caller]
fn check(requests: &[Vec<u8>], replies: &[Vec<u8>]) {
    let (got, ended) = talk(&requests.concat());
    assert_eq!(got, replies.concat());
    ended.unwrap();
}

#[test]
fn each_command_is_answered() {
    check(
        &[message(2, 9, &[])],
        &[reply(2, 9, 0, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
    );
    check(
        &[message(5, 1, &[])],
        &[reply(5, 1, 0, &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
    );
    check(&[message(29, 1, &[])], &[reply(29, 1, 0, &[3, 0, 0, 0, 0, 0, 0, 0])]);
    let slot: Vec<u8> = [2u64, 1].iter().flat_map(|number| number.to_le_bytes()).collect();
    check(&[message(39, 1, &2u64.to_le_bytes())], &[reply(39, 1, 0, &slot)]);
    for hole in [1, 3, u64::MAX, 1 << 52] {
        check(&[message(39, 1, &hole.to_le_bytes())], &[reply(39, 1, -22, &[])]);
    }
    check(&[message(17, 1, &physical(0x2ff8, 8))], &[reply(17, 1, 0, &[0x5a; 8])]);
    check(&[message(17, 1, &physical(0x2000, 4096))], &[reply(17, 1, 0, &[0x5a; 4096])]);
    check(
        &[
            message(18, 1, &[physical(0x10, 3), b"abc".to_vec()].concat()),
            message(17, 2, &physical(0xf, 5)),
        ],
        &[reply(18, 1, 0, &[]), reply(17, 2, 0, b"Zabc\x5a")],
    );
    let words: Vec<u8> = [1u64, 2, 3, 4].iter().flat_map(|word| word.to_le_bytes()).collect();
    check(&[message(22, 1, &[])], &[reply(22, 1, 0, &words)]);
}

#[test]
fn check_command_tells_what_is_offered() {
    let ask = |id: u16, what: u16| message(id, 1, &[&what.to_le_bytes()[..], &[0; 6]].concat());
    for id in 0..70 {
        let offered = [2, 3, 4, 5, 17, 18, 22, 27, 29, 39].contains(&id);
        check(&[ask(3, id)], &[reply(3, 1, if offered { 0 } else { -1 }, &[])]);
        check(&[ask(4, id)], &[reply(4, 1, -1, &[])]);
    }
    check(&[message(3, 1, &[2, 0, 0, 0, 0, 0, 0, 1])], &[reply(3, 1, -22, &[])]);
}

#[test]
fn a_bad_request_is_answered_and_the_connection_stays() {
    let version = || message(2, 7, &[]);
    let good = || reply(2, 7, 0, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let cases: &[(u16, Vec<u8>, i32)] = &[
        (17, physical(0, 0), -22),
        (17, physical(0, 4097), -22),
        (17, physical(0xfff, 2), -22),
        (17, physical(0x1000, 8), -22),
        (17, physical(u64::MAX, 1), -22),
        (17, vec![], -22),
        (18, physical(0, 4), -22),
        (18, [physical(0x1000, 1), vec![1]].concat(), -22),
        (27, vec![1, 1, 1, 0, 0, 0, 0, 0], -22),
        (2, vec![0; 8184], -22),
        (1, vec![], -95),
        (8, vec![0; 8], -95),
        (12, vec![], -95),
        (999, vec![1; 8184], -95),
        (13, vec![0; 16], -95),
        (7, vec![1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], -95),
        (7, vec![2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], -22),
        (13, vec![0, 0, 1, 0, 0, 0, 0, 0], -22),
        (6, vec![0; 7], -22),
    ];
    for (id, payload, err) in cases {
        check(&[message(*id, 3, payload), version()], &[reply(*id, 3, *err, &[]), good()]);
    }
}

#[test]
fn a_batch_is_answered_once() {
    let write =
        |at: u8| message(18, u32::from(at), &[physical(u64::from(at), 1), vec![at]].concat());
    check(
        &[control(10, false, true), write(1), write(2), write(3), control(11, true, true)],
        &[reply(27, 11, 0, &[])],
    );
}

#[test]
fn control_without_now_holds_from_the_next_message_on() {
    check(&[control(1, false, false), control(2, true, false)], &[reply(27, 1, 0, &[])]);
    check(
        &[control(1, false, false), control(2, true, false), control(3, true, true)],
        &[reply(27, 1, 0, &[]), reply(27, 3, 0, &[])],
    );
}

#[test]
fn errors_of_offered_commands_are_silent_in_a_batch() {
    check(
        &[
            control(1, false, true),
            message(17, 2, &physical(0, 0)),
            message(3, 3, &[1; 8]),
            control(4, true, true),
        ],
        &[reply(27, 4, 0, &[])],
    );
}

#[test]
fn the_first_refusal_of_a_batch_is_the_error_of_its_last_message() {
    let pause =
        |seq: u32, vcpu: u8| message(7, seq, &[vcpu, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let version = || (message(2, 9, &[]), reply(2, 9, 0, Version::OURS.as_bytes()));
    // What libkvmi sends to pause all vCPUs.
    check(
        &[control(1, false, true), pause(2, 0), pause(3, 1), control(4, true, true), version().0],
        &[reply(27, 4, -95, &[]), version().1],
    );
    check(
        &[
            control(1, false, true),
            pause(2, 2),
            message(999, 3, &[]),
            control(4, true, true),
            version().0,
        ],
        &[reply(27, 4, -22, &[]), version().1],
    );
    // Reported once, and apart from a batch.
    check(
        &[
            control(1, false, true),
            pause(2, 0),
            control(3, true, true),
            control(4, false, true),
            control(5, true, true),
        ],
        &[reply(27, 3, -95, &[]), reply(27, 5, 0, &[])],
    );
    // A message that switches the replies on for those after it is not answered itself.
    check(
        &[
            control(1, false, true),
            pause(2, 0),
            control(3, true, false),
            version().0,
            control(4, true, true),
        ],
        &[version().1, reply(27, 4, 0, &[])],
    );
}

#[test]
fn an_answer_to_an_event_is_not_answered() {
    let answer = |seq: u32| message(0, seq, &[0; 16]);
    check(&[answer(1), message(0, 2, &[]), control(3, true, true)], &[reply(27, 3, 0, &[])]);
    check(&[control(1, false, true), answer(2), control(3, true, true)], &[reply(27, 3, 0, &[])]);
}

#[test]
fn data_without_replies_ends_the_connection() {
    for id in [2, 5, 22, 29] {
        let (got, ended) = talk(&[control(1, false, true), message(id, 2, &[])].concat());
        assert!(got.is_empty());
        assert!(matches!(ended, Err(ServeError::RepliesOff(_))), "{ended:?}");
    }
}

#[test]
fn tokens_run_out() {
    let (got, ended) = talk(&message(22, 1, &[]).repeat(4));
    ended.unwrap();
    assert_eq!(got.len(), 3 * 48 + 16);
    assert_eq!(got[3 * 48..], reply(22, 1, -11, &[]));
}

#[test]
fn a_broken_stream_is_closed() {
    let (got, ended) = talk(&[2, 0, 0xf9, 0x1f, 1, 0, 0, 0]);
    assert!(got.is_empty());
    assert!(matches!(ended, Err(ServeError::TooLong { id: 2, size: 8185 })), "{ended:?}");
    let (got, ended) = talk(&[2, 0, 0]);
    assert!(got.is_empty());
    assert!(matches!(ended, Err(ServeError::Truncated)), "{ended:?}");
}

#[test]
fn a_shut_down_socket_ends_the_server() {
    let (ours, mut tools) = UnixStream::pair().unwrap();
    let stop = ours.try_clone().unwrap();
    let server = thread::spawn(move || serve(&ours, &Vm::default()));
    let mut answer = [0; 24];
    answer[0] = 24;
    tools.write_all(&answer).unwrap();
    tools.write_all(&message(2, 1, &[])).unwrap();
    tools.read_exact(&mut [0; 96 + 32]).unwrap();
    stop.shutdown(Shutdown::Both).unwrap();
    server.join().unwrap().unwrap();
}

#[test]
fn a_tool_that_drips_its_handshake_is_cut_off() {
    let (ours, mut tools) = UnixStream::pair().unwrap();
    let limits = Limits { handshake: Duration::from_millis(100), ..Limits::default() };
    let server = thread::spawn(move || serve_within(limits, &ours, &Vm::default()));
    // Each byte comes in time, but not all of them: the size announces 64 KiB.
    let drip = [&[0u8, 0, 1, 0][..], &[0; 0xffff - 4]].concat();
    let sent = drip.iter().take_while(|byte| {
        thread::sleep(Duration::from_millis(1));
        tools.write_all(&[**byte]).is_ok()
    });
    assert!(sent.count() < drip.len());
    let ended = server.join().unwrap();
    assert!(matches!(ended, Err(ServeError::Handshake(_))), "{ended:?}");
}

#[test]
fn a_tool_that_stops_within_a_message_is_cut_off() {
    let (ours, mut tools) = UnixStream::pair().unwrap();
    let limits = Limits { stall: Duration::from_millis(100), ..Limits::default() };
    let server = thread::spawn(move || serve_within(limits, &ours, &Vm::default()));
    tools.write_all(&[&[24u8][..], &[0; 23], &[2, 0, 0]].concat()).unwrap();
    let ended = server.join().unwrap();
    assert!(matches!(ended, Err(ServeError::Read(_))), "{ended:?}");
}

#[test]
fn a_message_may_come_in_pieces() {
    let (ours, mut tools) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || serve(&ours, &Vm::default()).unwrap());
        let requests =
            [vec![24], vec![0; 23], message(17, 1, &physical(0, 2)), message(29, 2, &[])].concat();
        for piece in requests.chunks(5) {
            tools.write_all(piece).unwrap();
            thread::yield_now();
        }
        tools.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        tools.read_to_end(&mut got).unwrap();
        assert_eq!(
            got[96..],
            [reply(17, 1, 0, &[0x5a; 2]), reply(29, 2, 0, &[3, 0, 0, 0, 0, 0, 0, 0])].concat()
        );
    });
}

/// A tool that has had its handshake, and the server's side of its connection.
fn greeted(vm: &Vm, space: &mut Workspace) -> (UnixStream, UnixStream, Connection) {
    let (ours, mut tools) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(vm, Limits::default());
    tools.write_all(&[&[24][..], &[0; 23]].concat()).unwrap();
    assert_eq!(turn(&mut connection, &ours, vm, space), Turn::More);
    assert!(connection.is_greeted());
    tools.read_exact(&mut [0; 96]).unwrap();
    (ours, tools, connection)
}

fn turn(connection: &mut Connection, ours: &UnixStream, vm: &Vm, space: &mut Workspace) -> Turn {
    connection.turn(&mut Socket { fd: ours.as_fd(), waits: false }, vm, space).unwrap()
}

#[test]
fn one_thread_serves_a_tool_while_another_is_late() {
    let (vm, mut space) = (Vm::default(), Workspace::default());
    let (late_ours, mut late, mut waits) = greeted(&vm, &mut space);
    let request = message(17, 1, &physical(0, 2));
    late.write_all(&request[..9]).unwrap();
    let Turn::Read(Some(deadline)) = turn(&mut waits, &late_ours, &vm, &mut space) else {
        panic!("a message that has begun has a deadline");
    };
    let (ours, mut tools, mut connection) = greeted(&vm, &mut space);
    for seq in 0..3 {
        tools.write_all(&message(17, seq, &physical(0x2000, 8))).unwrap();
        assert_eq!(turn(&mut connection, &ours, &vm, &mut space), Turn::Read(None));
        let mut got = [0; 24];
        tools.read_exact(&mut got).unwrap();
        assert_eq!(got[..], reply(17, seq, 0, &[0x5a; 8]));
    }
    // More of it does not prolong the time that there is for all of it.
    late.write_all(&request[9..12]).unwrap();
    assert_eq!(turn(&mut waits, &late_ours, &vm, &mut space), Turn::Read(Some(deadline)));
    late.write_all(&request[12..]).unwrap();
    assert_eq!(turn(&mut waits, &late_ours, &vm, &mut space), Turn::Read(None));
    let mut got = [0; 18];
    late.read_exact(&mut got).unwrap();
    assert_eq!(got[..], reply(17, 1, 0, &[0x5a; 2]));
}

#[test]
fn replies_wait_for_a_tool_that_does_not_read() {
    const COUNT: u32 = 600;
    let (vm, mut space) = (Vm::default(), Workspace::default());
    let (ours, mut tools, mut connection) = greeted(&vm, &mut space);
    // What they ask for is more than a socket holds; the requests are less.
    let requests: Vec<u8> =
        (0..COUNT).flat_map(|seq| message(17, seq, &physical(0x2000, 4096))).collect();
    tools.write_all(&requests).unwrap();
    let deadline = loop {
        match turn(&mut connection, &ours, &vm, &mut space) {
            Turn::More => {}
            Turn::Write(deadline) => break deadline,
            other => panic!("{other:?}"),
        }
    };
    // It reads nothing more meanwhile.
    assert_eq!(turn(&mut connection, &ours, &vm, &mut space), Turn::Write(deadline));
    tools.set_nonblocking(true).unwrap();
    let mut got = Vec::new();
    let whole = 16 + 4096;
    while got.len() < whole * COUNT as usize {
        let mut piece = [0; 1 << 16];
        match tools.read(&mut piece) {
            Ok(count) => got.extend_from_slice(&piece[..count]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        turn(&mut connection, &ours, &vm, &mut space);
    }
    for (seq, got) in (0..).zip(got.chunks(whole)) {
        assert_eq!(*got, reply(17, seq, 0, &[0x5a; 4096]));
    }
}

#[test]
fn a_tool_that_never_reads_is_cut_off() {
    let limits = Limits { stall: Duration::from_millis(50), ..Limits::default() };
    let (ours, mut tools) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || serve_within(limits, &ours, &Vm::default()));
    let requests = message(17, 1, &physical(0x2000, 4096)).repeat(600);
    tools.write_all(&[&[24][..], &[0; 23], &requests].concat()).unwrap();
    let ended = server.join().unwrap();
    assert!(matches!(ended, Err(ServeError::Write(_))), "{ended:?}");
}

/// A message that is more likely than chance to mean something.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let payload =
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..40),
            (0u64..0x4000, 0u64..5000).prop_map(|(gpa, size)| physical(gpa, size)),
            (0u64..0x4000, proptest::collection::vec(any::<u8>(), 0..64))
                .prop_map(|(gpa, data)| [physical(gpa, data.len() as u64), data].concat()),
            (any::<bool>(), any::<bool>()).prop_map(|(enable, now)| vec![
                enable.into(),
                now.into(),
                0,
                0,
                0,
                0,
                0,
                0
            ]),
        ];
    (0u16..32, any::<u32>(), payload).prop_map(|(id, seq, payload)| message(id, seq, &payload))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_end_the_connection_in_order(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = talk(&bytes);
    }

    #[test]
    fn any_messages_get_replies_in_order(messages in proptest::collection::vec(any_message(), 0..20)) {
        let (got, _) = talk(&messages.concat());
        let mut asked = messages.iter().map(|message| Header::parse(message).unwrap());
        let mut rest = &got[..];
        while !rest.is_empty() {
            let header = Header::parse(rest).unwrap();
            let size = usize::from(header.size.get());
            prop_assert!(size >= 8);
            let failed = rest[8..12] != [0; 4];
            prop_assert!(!failed || size == 8);
            prop_assert!(asked.any(|asked| (asked.id, asked.seq) == (header.id, header.seq)));
            rest = &rest[8 + size..];
        }
    }

    #[test]
    fn any_message_leaves_the_reply_within_bounds(id: u16, payload in proptest::collection::vec(any::<u8>(), 0..100)) {
        let (mut dispatcher, mut buffer) = (Dispatcher::default(), ReplyBuffer::default());
        let header = Header::new(id, u16::try_from(payload.len()).unwrap(), 5);
        let reply = dispatcher.answer(&Vm::default(), header, &payload, &mut buffer).unwrap();
        if let Some(reply) = reply {
            let header = Header::parse(reply).unwrap();
            prop_assert_eq!(usize::from(header.size.get()) + 8, reply.len());
        } else {
            let silenced = matches!(Request::decode(id, &payload), Ok(Request::ControlCmdResponse { enable: false, now: true }));
            prop_assert!(silenced || id == 0);
        }
    }
}
