// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views on the host, by a broker in this process and a target without a guest.

mod host;

use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use host::{Host, PAGE, PATIENCE, REGIONS};

use kvmmem::view::{State, Status};
use kvmmem::{Access, Event, Mapping, MappingError, Range, Token, View, ViewError};
use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantState, Rights, Span};
use kvmmem_client::vmm::{Change, Region};
use kvmmem_memory::{Memory, MemoryError};
use kvmmem_proto::message::Refusal;
use uuid::Uuid;

fn word(view: &View, gpa: u64) -> u64 {
    let mut bytes = [0; 8];
    view.read_at(gpa, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// The next event.
#[track_caller]
fn event(view: &View) -> Event {
    view.wait(PATIENCE).unwrap().expect("no event came")
}

#[track_caller]
fn assert_lost(mapping: &Mapping) {
    let gpa = mapping.gpa();
    assert_eq!(mapping.read_u64(0), Err(MappingError::Lost { gpa }));
    assert_eq!(mapping.read(3, &mut [0]), Err(MappingError::Lost { gpa: gpa + 3 }));
}

#[test]
fn a_read_only_view_reads_and_maps() {
    let host = Host::start();
    let (view, _) = host.view(Rights::ReadOnly);
    let status = view.status().unwrap();
    let ranges = vec![Range { gpa: 0, len: 4 * PAGE }, Range { gpa: 0x10_0000, len: 2 * PAGE }];
    let expected = Status {
        generation: status.generation,
        state: State::Open,
        is_writable: false,
        uuid: [7; 16],
        ranges: ranges.clone(),
    };
    assert_eq!(status, expected);
    assert_eq!(view.ranges().unwrap(), ranges);
    assert!(view.stats().unwrap().is_none());
    assert_eq!(word(&view, 0x3ff8), 0x3ff8);
    assert_eq!(word(&view, 0x10_1000), 0x10_1000);

    let mapping = view.map(ranges[1]).unwrap();
    assert_eq!((mapping.gpa(), mapping.len(), mapping.is_writable()), (0x10_0000, 2 * PAGE, false));
    assert_eq!(mapping.read_u64(PAGE + 8).unwrap(), 0x10_1008);
    host.ram.write_all_at(&[0xab], 9).unwrap();
    assert_eq!(mapping.read_u8(9).unwrap(), 0xab, "the memory itself, not a copy");

    for result in [view.write_at(0, &[1]), view.write_at(u64::MAX, &[1])] {
        assert!(matches!(result, Err(ViewError::ReadOnly { .. })), "{result:?}");
    }
    assert_eq!(mapping.write(0, &[1]), Err(MappingError::ReadOnly));
    assert_eq!(mapping.write_u64(0, 1), Err(MappingError::ReadOnly));
    assert_eq!(view.wait(Duration::ZERO).unwrap(), None);
}

#[test]
fn a_writable_view_writes() {
    let host = Host::start();
    let (view, _) = host.view(Rights::ReadWrite);
    assert!(view.status().unwrap().is_writable);
    view.write_at(0xffe, b"abcd").unwrap();
    let mapping = view.map(Range { gpa: 0, len: 2 * PAGE }).unwrap();
    mapping.write(0x1002, b"e").unwrap();
    mapping.write_u8(0x1003, b'f').unwrap();
    mapping.write_u16(0x10, 0x2222).unwrap();
    mapping.write_u32(0x14, 0x4444_4444).unwrap();
    mapping.write_u64(0x18, 0x8888_8888_8888_8888).unwrap();
    assert_eq!(word(&view, 0x10), 0x4444_4444_0000_2222);
    assert_eq!(
        (mapping.read_u16(0x10).unwrap(), mapping.read_u32(0x18).unwrap()),
        (0x2222, 0x8888_8888)
    );
    let unaligned = Err(MappingError::Unaligned { offset: 0x14, size: 8 });
    assert_eq!(mapping.write_u64(0x14, 0), unaligned);
    let outside = MappingError::Outside { offset: 2 * PAGE - 1, len: 2, size: 2 * PAGE };
    assert_eq!(mapping.read(2 * PAGE - 1, &mut [0; 2]), Err(outside));
    let mut bytes = [0; 6];
    host.ram.read_exact_at(&mut bytes, 2 * PAGE + 0xffe).unwrap();
    assert_eq!(&bytes, b"abcdef");

    let granted = host.grant(Rights::ReadWrite, None);
    let view = View::attach_host(&host.socket, &granted.token, Access::ReadOnly).unwrap();
    assert!(
        !view.status().unwrap().is_writable,
        "less than the grant allows, because it was asked for"
    );
    assert!(matches!(view.write_at(0, &[1]), Err(ViewError::ReadOnly { .. })));
}

#[test]
fn holes_are_named() {
    let host = Host::start();
    let (view, _) = host.view(Rights::ReadWrite);
    let mut buf = [0; 0x20];
    for (result, hole) in [
        (view.read_at(0x3ff0, &mut buf), 0x4000),
        (view.write_at(0x3ff0, &buf), 0x4000),
        (view.read_at(0xf_fff0, &mut buf), 0xf_fff0),
        (view.read_at(u64::MAX, &mut buf), u64::MAX),
        (view.write_at(0x10_2000, &buf), 0x10_2000),
        (view.map(Range { gpa: 0x2000, len: 3 * PAGE }).map(drop), 0x4000),
        (view.map(Range { gpa: 0x8000, len: PAGE }).map(drop), 0x8000),
    ] {
        assert!(
            matches!(result, Err(ViewError::Hole { gpa, .. }) if gpa == hole),
            "{result:?}, {hole:#x}"
        );
    }
    for range in [Range { gpa: 1, len: PAGE }, Range { gpa: 0, len: 1 }, Range { gpa: 0, len: 0 }] {
        assert!(matches!(view.map(range), Err(ViewError::Pages { .. })), "{range}");
    }
    view.read_at(0x9999, &mut []).unwrap();
}

#[test]
fn a_scope_is_all_that_is_seen() {
    let host = Host::start();
    let spans = vec![Span { gpa: PAGE, len: PAGE }, Span { gpa: 0x10_1000, len: PAGE }];
    let granted = host.grant(Rights::ReadOnly, Some(spans));
    let view = host.attach(&granted.token).unwrap();
    let ranges = [Range { gpa: PAGE, len: PAGE }, Range { gpa: 0x10_1000, len: PAGE }];
    assert_eq!(view.ranges().unwrap(), ranges);
    assert_eq!(word(&view, 0x1008), 0x1008);
    for gpa in [0, 0xfff, 0x2000, 0x10_0fff] {
        let result = view.read_at(gpa, &mut [0]);
        assert!(matches!(result, Err(ViewError::Hole { .. })), "{gpa:#x}");
    }
    assert!(matches!(view.read_at(0x1fff, &mut [0; 2]), Err(ViewError::Hole { gpa: 0x2000, .. })));
    assert!(matches!(
        view.map(Range { gpa: 0, len: 2 * PAGE }),
        Err(ViewError::Hole { gpa: 0, .. })
    ));
    assert_eq!(view.data_from(0).unwrap(), Some(ranges[0]));
    assert_eq!(view.data_from(0x2000).unwrap(), Some(ranges[1]));
    assert_eq!(view.data_from(0x10_2000).unwrap(), None);

    // The same by the trait.
    let memory: &dyn Memory = &view;
    assert_eq!(
        (memory.ranges().unwrap(), memory.data_from(0x2000).unwrap()),
        (ranges.to_vec(), Some(ranges[1]))
    );
    let (mut word, mut hole) = ([0; 8], [0; 2]);
    let error =
        memory.read_vectored(&mut [(0x1008, &mut word[..]), (0x1fff, &mut hole[..])]).unwrap_err();
    assert_eq!((u64::from_le_bytes(word), error.piece), (0x1008, 1));
    assert!(matches!(error.source, MemoryError::Hole { gpa: 0x2000 }), "{error:?}");
}

#[test]
fn a_revoked_grant_ends_the_view_of_any_tool() {
    let host = Host::start();
    let (view, grant) = host.view(Rights::ReadWrite);
    let mapping = view.map(Range { gpa: 0, len: 4 * PAGE }).unwrap();
    assert_eq!(mapping.read_u64(8).unwrap(), 8);

    // No thread waits for events: the view ends all the same, and the broker has the confirmation.
    let revoked = host.admin().revoke(grant).unwrap();
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 0));
    assert_lost(&mapping);
    assert_eq!(mapping.write(0, &[1]), Err(MappingError::Lost { gpa: 0 }));
    let range = Range { gpa: 0, len: PAGE };
    for result in [
        view.read_at(0, &mut [0]),
        view.write_at(0, &[0]),
        view.map(range).map(drop),
        view.data_from(0).map(drop),
    ] {
        assert!(matches!(result, Err(ViewError::Revoked { .. })), "{result:?}");
    }
    let status = view.status().unwrap();
    assert_eq!((status.state, status.ranges), (State::Revoked, vec![]));
    assert_eq!((event(&view), event(&view)), (Event::Revoked, Event::Revoked));
    view.detach().unwrap();
}

#[test]
fn readers_in_the_middle_of_a_mapping_are_stopped() {
    let host = Host::start();
    let (view, grant) = host.view(Rights::ReadOnly);
    let mapping = view.map(Range { gpa: 0, len: 4 * PAGE }).unwrap();
    // Each reader has read once before the revocation.
    let reading = Barrier::new(4);
    let ends = std::thread::scope(|scope| {
        let read = || {
            let (mut buf, end) = (vec![0; 4 * 0x1000], Instant::now() + PATIENCE);
            let first = mapping.read(0, &mut buf);
            reading.wait();
            if let Err(error) = first {
                return Some(error);
            }
            while Instant::now() < end {
                if let Err(error) = mapping.read(0, &mut buf) {
                    return Some(error);
                }
            }
            None
        };
        let readers: Vec<_> = (0..3).map(|_| scope.spawn(read)).collect();
        let waiter = scope.spawn(|| event(&view));
        reading.wait();
        assert_eq!(host.admin().revoke(grant).unwrap().unconfirmed, 0);
        assert_eq!(waiter.join().unwrap(), Event::Revoked);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(ends.iter().all(|end| matches!(end, Some(MappingError::Lost { .. }))), "{ends:?}");
}

#[test]
fn a_target_that_goes_away_ends_the_view() {
    let mut host = Host::start();
    let (view, _) = host.view(Rights::ReadOnly);
    let mapping = view.map(Range { gpa: 0x10_0000, len: PAGE }).unwrap();
    host.target = None;
    assert_eq!(event(&view), Event::Gone);
    assert_lost(&mapping);
    assert!(matches!(view.read_at(0, &mut [0]), Err(ViewError::Gone { .. })));
}

#[test]
fn a_broker_that_goes_away_ends_the_view() {
    let mut host = Host::start();
    let (view, _) = host.view(Rights::ReadOnly);
    let mapping = view.map(Range { gpa: 0, len: PAGE }).unwrap();
    host.end_broker();
    assert_eq!(event(&view), Event::Gone);
    assert_lost(&mapping);
}

#[test]
fn bad_tokens_attach_nothing() {
    let host = Host::start();
    let unknown = |result: Result<View, ViewError>| match result.unwrap_err() {
        error @ ViewError::AttachHost { .. } => {
            let text = error.to_string();
            assert!(text.contains("ask for a new token"), "{text}");
            let ViewError::AttachHost { source, .. } = error else { unreachable!() };
            assert!(
                matches!(*source, ClientError::Refused { refusal: Refusal::Unknown, .. }),
                "{source:?}"
            );
        }
        error => panic!("{error}"),
    };
    unknown(host.attach(&Token::new([1, 2, 3, 4])));
    let granted = host.grant(Rights::ReadOnly, None);
    let _view = host.attach(&granted.token).unwrap();
    unknown(host.attach(&granted.token));
    let granted = host.grant_to(Rights::ReadOnly, None, Some(Uuid::from_bytes([9; 16])));
    unknown(host.attach(&granted.token));
    let granted = host.grant(Rights::ReadOnly, None);
    host.admin().revoke(granted.grant).unwrap();
    unknown(host.attach(&granted.token));
}

#[test]
fn no_broker_is_told_with_a_remedy() {
    let result = View::attach_host(
        "/nonexistent/kvmmemd.sock".as_ref(),
        &Token::new([0; 4]),
        Access::Granted,
    );
    let text = result.unwrap_err().to_string();
    assert!(
        text.contains("/nonexistent/kvmmemd.sock") && text.contains("is kvmmemd running"),
        "{text}"
    );
}

#[test]
fn a_view_follows_changes_of_the_target() {
    let host = Host::start();
    let (view, _) = host.view(Rights::ReadOnly);
    let target = host.target.as_ref().unwrap();
    let mapping = view.map(Range { gpa: 0, len: 4 * PAGE }).unwrap();
    let before = view.status().unwrap().generation;

    target.ram_changed(REGIONS.to_vec(), Change::Reset);
    assert_eq!(event(&view), Event::Changed);
    let reset = view.status().unwrap().generation;
    assert!(reset > before);
    assert_eq!(mapping.read_u64(8).unwrap(), 8);

    let smaller = vec![Region { gpa: 0, len: PAGE, offset: 2 * PAGE, file: 0 }, REGIONS[1]];
    target.ram_changed(smaller, Change::Resized);
    assert_eq!(event(&view), Event::Changed);
    assert!(view.status().unwrap().generation > reset);
    assert_eq!(view.ranges().unwrap()[0], Range { gpa: 0, len: PAGE });
    assert_eq!(mapping.read_u64(8).unwrap(), 8);
    assert_eq!(mapping.read_u64(PAGE), Err(MappingError::Lost { gpa: PAGE }));
    assert!(matches!(view.read_at(PAGE, &mut [0]), Err(ViewError::Hole { .. })));

    target.ram_changed(REGIONS.to_vec(), Change::Resized);
    assert_eq!(event(&view), Event::Changed);
    assert_eq!(mapping.read_u64(PAGE).unwrap(), PAGE);
}

#[test]
fn a_mapping_keeps_the_view_and_detach_ends_it() {
    let host = Host::start();
    let open = |grant: u64| {
        let grants = host.admin().grants().unwrap();
        grants.iter().find(|info| info.id == grant).map_or(0, |info| info.views.len())
    };
    let wait_for = |grant: u64, count: usize| {
        let end = Instant::now() + PATIENCE;
        while open(grant) != count {
            assert!(Instant::now() < end, "still {} views", open(grant));
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let (view, grant) = host.view(Rights::ReadOnly);
    let mapping = view.map(Range { gpa: 0, len: PAGE }).unwrap();
    wait_for(grant, 1);
    drop(view);
    assert_eq!(mapping.read_u64(8).unwrap(), 8);
    assert_eq!(open(grant), 1);
    drop(mapping);
    wait_for(grant, 0);

    let (view, grant) = host.view(Rights::ReadOnly);
    let mapping = view.map(Range { gpa: 0, len: PAGE }).unwrap();
    view.detach().unwrap();
    assert_lost(&mapping);
    wait_for(grant, 0);
    let states = host.admin().grants().unwrap();
    assert!(states.iter().all(|info| info.state != GrantState::Revoked));
}
