// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any packet to the broker, and any packet from it, also those of a channel for copies; what is
//! taken is written and read again. What a grant cuts out of a memory map lies in it.
#![no_main]

use kvmmem_proto::copy::{BUFFER, CopyAnswer, CopyRequest, SLOT};
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::map::{MemoryMap, Region};
use kvmmem_proto::message::{Answer, Call, FromBroker, MAX_PACKET, Request};
use kvmmem_proto::scope::{MAX_SPANS, Rights, Scope, Span};

use libfuzzer_sys::fuzz_target;
use serde_json::{from_slice, to_vec};

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() > MAX_PACKET {
        return;
    }
    if let Ok(text) = str::from_utf8(bytes)
        && let Ok(endpoint) = text.parse::<Endpoint>()
    {
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
    }
    if let Some(request) = CopyRequest::decode(bytes) {
        assert_eq!(request.encode(), bytes);
        let sum: u64 = request.pieces.iter().map(|piece| u64::from(piece.len)).sum();
        assert!(sum > 0 && sum <= SLOT as u64 && u64::from(request.at) + sum <= BUFFER as u64);
    }
    if let Some(answer) = CopyAnswer::decode(bytes) {
        assert_eq!(answer.encode(), bytes);
    }
    if let Ok(request) = from_slice::<Request>(bytes) {
        let written = to_vec(&request).expect("a request that was read");
        let again: Request = from_slice(&written).expect("a request that was written");
        assert_eq!(to_vec(&again).expect("once more"), written);
        match request.call {
            Call::Register(registration) => check_map(registration.regions),
            Call::RamChanged { regions, .. } => check_map(regions),
            Call::Attach { reaching, .. } => check_reaching(&reaching),
            Call::Grant(asked) => check_scope(&Scope { rights: asked.rights, spans: asked.spans }),
            _ => {}
        }
    }
    if let Ok(message) = from_slice::<FromBroker>(bytes) {
        let written = to_vec(&message).expect("a message that was read");
        assert!(from_slice::<FromBroker>(&written).is_ok());
        if let FromBroker::Answer { answer: Answer::Attached { scope, .. }, .. } = &message {
            check_scope(scope);
        }
    }
});

fn check_map(regions: Vec<Region>) {
    let Ok(map) = MemoryMap::new(regions) else { return };
    for region in map.regions() {
        assert_eq!(map.resolve(region.gpa), Some((region.file, region.offset)));
        assert_eq!(
            map.resolve(region.gpa + region.len - 1),
            Some((region.file, region.offset + region.len - 1))
        );
        assert_eq!(map.region_of(region.gpa + region.len - 1), Some(region));
    }
    assert_eq!(map.resolve(map.end_gfn() * 4096), None);
}

fn check_reaching(spans: &[Span]) {
    let region = |gpa: u64, len: u64| Region { gpa, len, offset: gpa, file: 0 };
    let map =
        MemoryMap::new(vec![region(0, 0x8000), region(0x10_0000, 1 << 32)]).expect("our own map");
    if Scope::whole(Rights::ReadOnly).check_reaches(spans, &map).is_ok() {
        assert!(spans.len() <= MAX_SPANS);
        for span in spans {
            let is_in = |region: &Region| {
                span.gpa.max(region.gpa) < (span.gpa + span.len).min(region.gpa + region.len)
            };
            assert!(map.regions().iter().any(is_in));
        }
    }
}

fn check_scope(scope: &Scope) {
    let region = |gpa: u64, len: u64| Region { gpa, len, offset: gpa + 0x1000, file: 0 };
    let map =
        MemoryMap::new(vec![region(0, 0x8000), region(0x10_0000, 1 << 32)]).expect("our own map");
    let is_taken = scope.check(&map).is_ok();
    let pieces = scope.regions(&map);
    if !is_taken {
        return;
    }
    assert!((1..=MAX_SPANS).contains(&pieces.len()));
    let mut end = 0;
    for piece in pieces {
        assert!(
            piece.gpa >= end && piece.len > 0 && piece.gpa % 4096 == 0 && piece.len % 4096 == 0
        );
        end = piece.gpa + piece.len;
        assert!(scope.contains(piece.gpa) && scope.contains(end - 1));
        assert_eq!(map.resolve(piece.gpa), Some((piece.file, piece.offset)));
        assert_eq!(map.resolve(end - 1), Some((piece.file, piece.offset + piece.len - 1)));
    }
}
