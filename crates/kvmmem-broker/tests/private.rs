// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A target whose VMM keeps its RAM to itself: it is copied and never mapped.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantRequest, Span};
use kvmmem_client::vmm::{RedeemError, Region, Registration, Rights, Token};
use kvmmem_kvmi::request as kvmi;
use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, Piece, Status};
use kvmmem_proto::message::{Answer, Call, Caller, FromBroker, Refusal, Request, Unusable};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};

use common::{TestBroker, Tool, caller, memfd, request, target, uuid, wait_for};
use kvmmem::host::{Copier, CopyError, HostEvent, HostLink, HostView};
use kvmmem_abi::errno::KvmError;
use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags, fallocate};
use rustix::io::{pread, pwrite};

const SOON: Duration = Duration::from_secs(30);

/// More bytes than the channels of a view hold.
const MANY: usize = 1 << 20;

/// Where the second region begins.
const HIGH: u64 = 1 << 32;

/// The RAM of a VM in the memory of this process: 3 MiB from 0, 64 KiB from 4 GiB.
struct Private {
    memory: Vec<u8>,
    vm: u64,
}

impl Private {
    const LOW_LEN: u64 = 3 << 20;
    const HIGH_LEN: u64 = 64 << 10;

    fn start(broker: &TestBroker, name: &str) -> Self {
        let len = usize::try_from(Self::LOW_LEN + Self::HIGH_LEN).unwrap() + 0x1000;
        let mut memory = vec![0; len];
        let hva = (memory.as_ptr().addr() as u64).next_multiple_of(0x1000);
        let start = usize::try_from(hva).unwrap() - memory.as_ptr().addr();
        for (at, byte) in memory[start..].iter_mut().enumerate() {
            *byte = pattern(at as u64);
        }
        let region = |gpa, len, offset| Region { gpa, len, offset, file: 0 };
        let regions =
            vec![region(0, Self::LOW_LEN, hva), region(HIGH, Self::HIGH_LEN, hva + Self::LOW_LEN)];
        let own = rustix::fs::open("/proc/self/mem", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .unwrap();
        let vm = Self::register(broker, name, own, regions);
        Self { memory, vm }
    }

    /// Registers a VM with private RAM; returns its number.
    fn register(broker: &TestBroker, name: &str, memory: OwnedFd, regions: Vec<Region>) -> u64 {
        let registration = Registration { regions, ..target(name) };
        broker.state.register_private(registration, memory, std::process::id()).unwrap()
    }
}

/// What is at an offset of the memory at first.
fn pattern(at: u64) -> u8 {
    (at % 251) as u8
}

fn attach(broker: &TestBroker, token: &Token, read_only: bool) -> (HostLink, HostView, Copier) {
    let (link, mut view) = HostLink::attach(&broker.path, token, read_only).unwrap();
    let copier = view.copier.take().expect("there is nothing to copy by");
    (link, view, copier)
}

/// Waits for events, as a client that copies must; returns the first.
fn pump(mut link: HostLink) -> std::thread::JoinHandle<(HostLink, HostEvent)> {
    std::thread::spawn(move || {
        let event = link.wait(SOON).unwrap().expect("nothing has happened");
        (link, event)
    })
}

#[test]
fn a_process_reads_and_writes_copies_as_far_as_its_grant_reaches() {
    let broker = TestBroker::start();
    let private = Private::start(&broker, "tiger");
    let spans =
        Some(vec![Span { gpa: 0x1000, len: Private::LOW_LEN }, Span { gpa: HIGH, len: 0x2000 }]);
    let granted = broker.grant(&GrantRequest { spans, uses: 2, ..request(Rights::ReadWrite) });
    let (link, view, copier) = attach(&broker, &granted.token, false);
    assert!(view.files.is_empty());
    let told = |gpa, len| Region { gpa, len, offset: gpa, file: 0 };
    // None of the VMM's addresses.
    assert_eq!(view.regions, [told(0x1000, Private::LOW_LEN - 0x1000), told(HIGH, 0x2000)]);
    let pump = pump(link);

    // More than the channels hold at a time.
    let mut bytes = vec![0xee; MANY + 1];
    assert_eq!(copier.read(0x1003, &mut bytes[..MANY]).unwrap(), MANY);
    assert!(
        bytes[..MANY].iter().enumerate().all(|(at, byte)| *byte == pattern(0x1003 + at as u64))
    );
    assert_eq!(bytes[MANY], 0xee);
    assert_eq!(copier.write(HIGH + 0x1ffd, b"stripes").unwrap(), 3);
    let mut few = [0; 8];
    assert_eq!(copier.read(HIGH + 0x1ffc, &mut few).unwrap(), 4);
    assert_eq!(&few, &[pattern(Private::LOW_LEN + 0x1ffc), b's', b't', b'r', 0, 0, 0, 0]);
    assert_eq!(copier.read(Private::LOW_LEN - 5, &mut few).unwrap(), 5);
    assert_eq!((copier.read(0x1000, &mut []).unwrap(), copier.write(0x1000, &[]).unwrap()), (0, 0));
    for gpa in [0, 0xfff, Private::LOW_LEN, HIGH - 1, HIGH + 0x2000, u64::MAX] {
        assert!(matches!(copier.read(gpa, &mut few), Err(CopyError::Hole)), "{gpa:#x}");
        assert!(matches!(copier.write(gpa, b"x"), Err(CopyError::Hole)), "{gpa:#x}");
    }

    let (reading, _, reader) = attach(&broker, &granted.token, true);
    let second = self::pump(reading);
    assert!(matches!(reader.write(0x1000, b"x"), Err(CopyError::ReadOnly)));
    reader.read(0x1000, &mut few).unwrap();

    // Many at a time take turns.
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let copier = &copier;
            scope.spawn(move || {
                let mut bytes = [0; 5000];
                for round in 0..20 {
                    let gpa = 0x2000 + thread * 0x4_0000 + round * 777;
                    assert_eq!(copier.read(gpa, &mut bytes).unwrap(), bytes.len());
                    assert!(
                        bytes
                            .iter()
                            .enumerate()
                            .all(|(at, byte)| *byte == pattern(gpa + at as u64))
                    );
                }
            });
        }
    });

    // The grant ends, and with it both views, at once.
    let revoked = std::thread::spawn({
        let path = broker.path.clone();
        move || kvmmem_client::admin::Admin::connect(&path).unwrap().revoke(granted.grant).unwrap()
    });
    for pump in [pump, second] {
        let (mut link, event) = pump.join().unwrap();
        assert_eq!(event, HostEvent::Revoked);
        link.confirm();
    }
    assert_eq!((revoked.join().unwrap().views, broker.grants()[0].views.len()), (2, 0));
    assert!(matches!(copier.read(0x1000, &mut few), Err(CopyError::Revoked)));
    assert!(matches!(copier.write(0x1000, b"x"), Err(CopyError::Revoked)));
    drop(private.memory);
}

#[test]
fn copies_end_with_the_target_and_with_the_broker() {
    let broker = TestBroker::start();
    let private = Private::start(&broker, "tiger");
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let (link, _, copier) = attach(&broker, &granted.token, false);
    let pump_one = pump(link);
    let mut bytes = vec![0; MANY];
    copier.read(0, &mut bytes).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut bytes = vec![0; MANY];
            loop {
                if let Err(error) = copier.read(0, &mut bytes) {
                    return error;
                }
                assert!(!is_over.load(Ordering::Relaxed));
            }
        });
        broker.state.remove(private.vm);
        let error = busy.join().unwrap();
        assert!(matches!(error, CopyError::Gone), "{error:?}");
        is_over.store(true, Ordering::Relaxed);
    });
    drop(broker);
    assert_eq!(pump_one.join().unwrap().1, HostEvent::Gone);
    assert!(matches!(copier.read(0, &mut bytes), Err(CopyError::Gone)));
}

#[test]
fn a_vmm_that_has_ended_is_not_one_without_memory() {
    use std::process::{Command, Stdio};
    let broker = TestBroker::start();
    let mut vmm = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Once it echoes, it is itself and no copy of this process any more.
    std::io::Write::write_all(vmm.stdin.as_mut().unwrap(), b"x").unwrap();
    std::io::Read::read_exact(vmm.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vmm.id())).unwrap();
    let stack =
        maps.lines().find(|line| line.ends_with("[stack]")).unwrap().split('-').next().unwrap();
    let end = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
    let end = end.split(['-', ' ']).nth(1).unwrap();
    let [hva, end] = [stack, end].map(|digits| u64::from_str_radix(digits, 16).unwrap());
    let memory =
        std::fs::File::options().read(true).write(true).open(format!("/proc/{}/mem", vmm.id()));
    let regions = vec![Region { gpa: 0, len: end - hva, offset: hva, file: 0 }];
    Private::register(&broker, "tiger", memory.unwrap().into(), regions);
    let granted = broker.grant(&request(Rights::ReadOnly));
    let (link, _, copier) = attach(&broker, &granted.token, true);
    let pump = pump(link);
    copier.read(0, &mut [0; 8]).unwrap();
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    assert!(matches!(copier.read(0, &mut [0; 8]), Err(CopyError::Gone)));
    drop(broker);
    pump.join().unwrap();
}

#[test]
fn kvmi_reads_and_writes_it_and_says_that_no_vm_can_map_it() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("tiger", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    let token = session.token().unwrap();
    let (_lion, vm) = (broker.introspector("lion", 7), broker.state.number("tiger").unwrap());
    let minted = broker.mint(vm, 7);
    assert_eq!(minted.unwrap_err(), KvmError::OpNotSupp);
    // A tool on the host can have copies.
    let (link, _, copier) = attach(&broker, &token, false);
    let pump = pump(link);
    copier.write(HIGH, b"kvmi").unwrap();
    let read = session.ask(kvmi::Request::ReadPhysical { gpa: HIGH, size: 4 }).unwrap();
    assert_eq!(read, b"kvmi");
    drop(session);
    drop(broker);
    pump.join().unwrap();
}

#[test]
fn a_vmm_is_refused_and_the_token_keeps_its_uses() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let lion = broker.introspector("lion", 7);
    let granted = broker.grant(&request(Rights::ReadWrite));
    assert_eq!(lion.attach(&granted.token, &caller(), true).unwrap_err(), RedeemError::Private);
    assert_eq!(lion.redeem(&granted.token).unwrap_err(), RedeemError::Private);
    assert_eq!(broker.grants()[0].uses_left, 1);
    assert!(RedeemError::Private.to_string().contains("memory-backend-memfd"));
    let holder = Some(uuid("lion"));
    match broker.admin().grant(&GrantRequest { holder, ..request(Rights::ReadOnly) }) {
        Err(ClientError::Refused { refusal: Refusal::Invalid, message }) => {
            assert!(message.contains("private") && message.contains("share=on"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    let (_link, view, _) = attach(&broker, &granted.token, true);
    assert_eq!(view.rights, Rights::ReadOnly);
}

/// A connection with a view that copies, by hand.
struct Hand {
    socket: PacketSocket,
    buffer: PacketBuffer,
    view: u64,
}

impl Hand {
    fn attach(broker: &TestBroker, token: &Token) -> Self {
        let socket = PacketSocket::connect(&broker.path, SOON).unwrap();
        socket.limit_receive(Some(SOON)).unwrap();
        let mut hand = Self { socket, buffer: PacketBuffer::default(), view: 0 };
        let nobody = Caller { pid: 0, uid: 0, comm: String::new() };
        let call = Call::Attach {
            token: token.clone(),
            caller: nobody,
            read_only: false,
            reaching: vec![],
        };
        match hand.ask(call, &[]) {
            FromBroker::Answer {
                answer: Answer::HostAttached { view, copied: true, .. }, ..
            } => {
                hand.view = view;
            }
            other => panic!("{other:?}"),
        }
        hand
    }

    fn ask(&mut self, call: Call, files: &[OwnedFd]) -> FromBroker {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.socket.send(&Request { id: 9, call }, &files, Wait::Limited).unwrap();
        self.socket.receive(&mut self.buffer).unwrap().unwrap().0
    }

    /// Opens a channel; returns its socket.
    fn open(&mut self, view: u64, files: &[OwnedFd]) -> Result<OwnedFd, Refusal> {
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let request = Request { id: 9, call: Call::OpenCopies { view } };
        self.socket.send(&request, &borrowed, Wait::Limited).unwrap();
        match self.socket.receive(&mut self.buffer).unwrap().unwrap() {
            (FromBroker::Answer { answer: Answer::CopiesOpened, .. }, mut files) => {
                Ok(files.pop().unwrap())
            }
            (FromBroker::Refused { refusal, .. }, _) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }
}

/// What a channel answers to a packet; `None` where it is closed.
fn send(channel: &OwnedFd, packet: &[u8]) -> Option<CopyAnswer> {
    rustix::net::sockopt::set_socket_timeout(
        channel,
        rustix::net::sockopt::Timeout::Recv,
        Some(SOON),
    )
    .unwrap();
    if rustix::net::send(channel, packet, rustix::net::SendFlags::NOSIGNAL).is_err() {
        return None;
    }
    let mut answer = [0; 64];
    let (_, count) =
        rustix::net::recv(channel, &mut answer, rustix::net::RecvFlags::empty()).ok()?;
    CopyAnswer::decode(&answer[..count])
}

fn read(channel: &OwnedFd, pieces: &[(u64, u32)]) -> Option<(Status, u32, u32)> {
    let pieces = pieces.iter().map(|(gpa, len)| Piece { gpa: *gpa, len: *len }).collect();
    let answer = send(channel, &CopyRequest { id: 77, write: false, at: 0, pieces }.encode())?;
    assert_eq!(answer.id, 77);
    Some((answer.status, answer.pieces, answer.bytes))
}

fn allocated(size: u64) -> OwnedFd {
    let file = memfd(size, SealFlags::SHRINK);
    fallocate(&file, FallocateFlags::empty(), 0, size).unwrap();
    file
}

#[test]
fn channels_that_make_no_sense_are_not_opened() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let _shared = broker.target("lion");
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let mut hand = Hand::attach(&broker, &granted.token);
    let other = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let good = || allocated(BUFFER as u64);
    let file = |file: std::fs::File| vec![OwnedFd::from(file)];
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    let unsealed = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    pwrite(&unsealed, &[0; BUFFER], 0).unwrap();
    let sealed = good();
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let cases: Vec<Vec<OwnedFd>> = vec![
        vec![],
        vec![good(), good()],
        file(null()),
        vec![writer.into()],
        vec![allocated(BUFFER as u64 - 0x1000)],
        // What the broker would have to pay for.
        vec![memfd(BUFFER as u64, SealFlags::SHRINK)],
        file(tempfile::tempfile().unwrap()),
        vec![unsealed],
        vec![sealed],
    ];
    for files in cases {
        assert_eq!(hand.open(view, &files).unwrap_err(), Refusal::Invalid, "{files:?}");
    }
    // Another connection's view, and none at all.
    for view in [other.view, 0, u64::MAX] {
        assert_eq!(hand.open(view, &[good()]).unwrap_err(), Refusal::Unknown);
    }
    // Each has a thread: a connection has few.
    let channels: Vec<OwnedFd> = (0..4).map(|_| hand.open(view, &[good()]).unwrap()).collect();
    assert_eq!(hand.open(view, &[good()]).unwrap_err(), Refusal::Limit);
    drop(channels);
    wait_for("the channels to end", || hand.open(view, &[good()]).is_ok());
}

#[test]
fn requests_that_make_no_sense_copy_nothing() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let file = allocated(BUFFER as u64);
    for packet in [&[][..], &[0; 15], &[0xff; 32], &[0; 1 << 16]] {
        let channel = hand.open(view, &[file.try_clone().unwrap()]).unwrap();
        assert_eq!(send(&channel, packet), None, "{} bytes", packet.len());
    }
    let first = Private::LOW_LEN - 0x1000;
    let mut channel = None;
    wait_for("the channels to end", || {
        channel = hand.open(view, &[file.try_clone().unwrap()]).ok();
        channel.is_some()
    });
    let channel = channel.unwrap();
    // A hole ends it, at the very byte; what comes before is there.
    assert_eq!(read(&channel, &[(first, 0x1000), (HIGH, 3)]), Some((Status::Done, 2, 0)));
    assert_eq!(read(&channel, &[(first, 0x1001), (HIGH, 3)]), Some((Status::Hole, 0, 0x1000)));
    assert_eq!(read(&channel, &[(HIGH, 3), (HIGH - 1, 3)]), Some((Status::Hole, 1, 0)));
    let mut bytes = [0; 3];
    pread(&file, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0, 1, 2].map(|at| pattern(Private::LOW_LEN + at)));
    // Its memory can be taken away while it is used.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, hole, 0, BUFFER as u64).unwrap();
    assert_eq!(read(&channel, &[(0, 0x1000)]), Some((Status::Done, 1, 0)));

    // One that never confirms has no more copies all the same, by old channels or new ones.
    let revoked = broker.admin().revoke(granted.grant).unwrap();
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 1));
    let pushed = hand.socket.receive::<FromBroker>(&mut hand.buffer).unwrap().unwrap().0;
    assert!(matches!(pushed, FromBroker::Revoke { .. }), "{pushed:?}");
    assert_eq!(read(&channel, &[(0, 8)]), Some((Status::Ended, 0, 0)));
    assert_eq!(hand.open(view, &[allocated(BUFFER as u64)]).unwrap_err(), Refusal::Unknown);
}

#[test]
fn channels_end_with_their_connection() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&request(Rights::ReadWrite));
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let channel = hand.open(view, &[allocated(BUFFER as u64)]).unwrap();
    assert_eq!(read(&channel, &[(0, 8)]), Some((Status::Done, 1, 0)));
    drop(hand);
    wait_for("the channel to end", || read(&channel, &[(0, 8)]).is_none());
    // And with the broker.
    let granted = broker.grant(&request(Rights::ReadWrite));
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let channel = hand.open(view, &[allocated(BUFFER as u64)]).unwrap();
    broker.stop();
    wait_for("the channel to end", || read(&channel, &[(0, 8)]).is_none());
}

/// As a tool does that has no descriptors for a channel.
#[test]
fn a_view_that_is_undone_copies_no_more_and_leaves_its_use_to_another() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&request(Rights::ReadWrite));
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    let channel = hand.open(view, &[allocated(BUFFER as u64)]).unwrap();
    let call = Call::Unreceived { target: 1, introduction: 0, unusable: Unusable::View(view) };
    hand.socket.send(&Request { id: 0, call }, &[], Wait::Limited).unwrap();
    wait_for("the use to be returned", || broker.grants()[0].uses_left == 1);
    assert_eq!(read(&channel, &[(0, 8)]), Some((Status::Ended, 0, 0)));
    Hand::attach(&broker, &granted.token);
}

#[test]
fn channels_leave_no_descriptor_behind() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&request(Rights::ReadWrite));
    let mut hand = Hand::attach(&broker, &granted.token);
    let view = hand.view;
    // Of this kind the other tests of this program have none.
    let left = || {
        let is_copy = |path: std::io::Result<std::path::PathBuf>| {
            path.is_ok_and(|path| path.to_string_lossy().contains("left-behind"))
        };
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        let files = files
            .filter(|entry| is_copy(std::fs::read_link(entry.as_ref().unwrap().path())))
            .count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (files, maps.matches("left-behind").count())
    };
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("left-behind", flags).unwrap();
    rustix::fs::ftruncate(&file, BUFFER as u64).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, BUFFER as u64).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    let files = [file];
    for _ in 0..20 {
        let mut channel = None;
        wait_for("a channel", || {
            channel = hand.open(view, &files).ok();
            channel.is_some()
        });
        assert_eq!(read(&channel.unwrap(), &[(0, 0x1000)]), Some((Status::Done, 1, 0)));
        assert!(hand.open(0, &files).is_err());
    }
    wait_for("the channels to be closed", || left() == (1, 0));
}

#[test]
fn a_batch_is_copied_piece_by_piece_up_to_the_first_that_cannot_be() {
    let broker = TestBroker::start();
    let _private = Private::start(&broker, "tiger");
    let granted = broker.grant(&request(Rights::ReadOnly));
    let (link, _, copier) = attach(&broker, &granted.token, true);
    let pump = pump(link);
    let batch = |places: &[(u64, usize)]| {
        let mut buffers: Vec<Vec<u8>> = places.iter().map(|(_, len)| vec![0xee; *len]).collect();
        let mut pieces: Vec<(u64, &mut [u8])> = places
            .iter()
            .zip(&mut buffers)
            .map(|((gpa, _), bytes)| (*gpa, bytes.as_mut_slice()))
            .collect();
        let result = copier.read_pieces(&mut pieces);
        (result, buffers)
    };
    let is_right = |gpa: u64, bytes: &[u8]| {
        let at = if gpa < HIGH { gpa } else { gpa - HIGH + Private::LOW_LEN };
        bytes.iter().zip(at..).all(|(byte, at)| *byte == pattern(at))
    };
    // Thousands of small ones, some large, some empty.
    let mut places: Vec<(u64, usize)> =
        (0..3000).map(|n| (n * 977, usize::try_from(n % 40).unwrap())).collect();
    places.extend([(5, 700_000), (HIGH + 1, 0x8000), (77, 0), (0x1000, 1 << 20), (HIGH, 1)]);
    let (result, buffers) = batch(&places);
    result.unwrap();
    assert!(places.iter().zip(&buffers).all(|((gpa, _), bytes)| is_right(*gpa, bytes)));
    let (result, _) = batch(&[]);
    result.unwrap();
    for before in [0usize, 1, 40, 300, 2000] {
        let mut places: Vec<(u64, usize)> = (0..before).map(|n| (n as u64 * 1024, 1024)).collect();
        places.push((HIGH + Private::HIGH_LEN - 7, 9));
        places.extend((0..100).map(|n| (n * 4096, 4096)));
        let (result, buffers) = batch(&places);
        let stopped = result.unwrap_err();
        assert_eq!((stopped.piece, stopped.bytes), (before, 7));
        assert!(matches!(stopped.error, CopyError::Hole), "{stopped:?}");
        assert!(
            places.iter().zip(&buffers).take(before).all(|((gpa, _), bytes)| is_right(*gpa, bytes))
        );
        assert!(
            is_right(places[before].0, &buffers[before][..7]) && buffers[before][7..] == [0xee; 2]
        );
        // The next batch is not disturbed by what was left of this one.
        batch(&places[..before]).0.unwrap();
    }
    drop(broker);
    pump.join().unwrap();
}
