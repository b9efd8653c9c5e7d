// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A target whose VMM keeps its RAM to itself: it is copied and never mapped.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantRequest, Span};
use kvmmem_client::vmm::{RedeemError, Region, Rights, Token};
use kvmmem_kvmi::request as kvmi;
use kvmmem_proto::message::Refusal;

use common::private::{HIGH, Private, pattern};
use common::{TestBroker, Tool, caller, request, uuid};
use kvmmem::host::{Copier, CopyError, HostEvent, HostLink, HostView};
use kvmmem_abi::errno::KvmError;

const SOON: Duration = common::PATIENCE;

/// More bytes than the channels of a view hold.
const MANY: usize = 1 << 20;

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
    let mut admin = broker.admin();
    let revoked = std::thread::spawn(move || admin.revoke(granted.grant).unwrap());
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
                let was_over = is_over.load(Ordering::Acquire);
                if let Err(error) = copier.read(0, &mut bytes) {
                    return error;
                }
                assert!(!was_over, "a copy that began after the target's end has succeeded");
            }
        });
        broker.state.remove(private.vm);
        is_over.store(true, Ordering::Release);
        let error = busy.join().unwrap();
        assert!(matches!(error, CopyError::Gone), "{error:?}");
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
    let private = Private::start(&broker, "tiger");
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
    // The test alone removes it, and its hook ends with it.
    broker.state.remove(private.vm);
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
