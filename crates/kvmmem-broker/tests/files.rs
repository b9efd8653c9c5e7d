// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A target whose RAM lies in several files: NUMA nodes, or DIMMs.

mod common;

use std::os::fd::OwnedFd;

use kvmmem_client::admin::{GrantRequest, Span};
use kvmmem_client::vmm::{Change, Region, Registration, Rights, VmmLink};
use kvmmem_proto::map::MAX_FILES;

use common::{TestBroker, caller, memfd, request, target};
use kvmmem::host::HostLink;
use rustix::fs::SealFlags;
use rustix::io::{Errno, pread, pwrite};

const LEN: u64 = 0x4000;

/// As many nodes as there may be, each with a file of its own that begins with its number.
fn nodes() -> (Vec<OwnedFd>, Vec<Region>) {
    let file = |number: u8| {
        let file = memfd(LEN, SealFlags::SHRINK);
        pwrite(&file, &[number], 0).unwrap();
        file
    };
    let region = |file| Region { gpa: u64::from(file) * LEN, len: LEN, offset: 0, file };
    let count = u8::try_from(MAX_FILES).unwrap();
    ((0..count).map(file).collect(), (0..u32::from(count)).map(region).collect())
}

fn first_byte(file: impl std::os::fd::AsFd) -> u8 {
    let mut byte = [0xff];
    pread(file, &mut byte, 0).unwrap();
    byte[0]
}

#[test]
fn an_introspector_gets_every_file_in_its_place() {
    let broker = TestBroker::start();
    let (files, regions) = nodes();
    let tiger = Registration { regions: regions.clone(), ..target("tiger") };
    let tiger = VmmLink::connect(&broker.path, tiger, files).unwrap();
    let lion = broker.introspector("lion", 7);
    let granted = broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadWrite) });
    let attached = lion.attach(&granted.token, &caller(), false).unwrap();
    for region in &regions {
        assert_eq!(attached.target.resolve(region.gpa + 5), Some((region.file, 5)));
        let file = attached.target.file(region.file).unwrap();
        assert_eq!(u32::from(first_byte(file)), region.file);
    }
    assert!(attached.target.file(16).is_none() && attached.target.file(u32::MAX).is_none());

    // A node goes: its file stays, and a later introspector gets it as well.
    let fewer = regions.iter().filter(|region| region.file != 15).copied().collect::<Vec<_>>();
    tiger.ram_changed(fewer.clone(), Change::Resized);
    common::wait_for("the change to come", || {
        lion.current(attached.view).is_some_and(|target| target.map().regions() == fewer)
    });
    let redeemed = broker.introspector("puma", 8).redeem(&granted.token).unwrap();
    assert_eq!(redeemed.target.map().regions(), fewer);
    assert_eq!(redeemed.target.file(15).map(first_byte), Some(15));
}

#[test]
fn a_process_of_the_host_gets_every_file_by_its_rights() {
    let broker = TestBroker::start();
    let (files, regions) = nodes();
    let _tiger =
        VmmLink::connect(&broker.path, Registration { regions, ..target("tiger") }, files).unwrap();
    let spans = Some(vec![Span { gpa: LEN + 0x1000, len: 2 * LEN }]);
    let granted = broker.grant(&GrantRequest { spans, uses: 2, ..request(Rights::ReadWrite) });
    let (_link, view) = HostLink::attach(&broker.path, &granted.token, true).unwrap();
    let part = |gpa, len, offset, file| Region { gpa, len, offset, file };
    let expected =
        [part(0x5000, 0x3000, 0x1000, 1), part(0x8000, 0x4000, 0, 2), part(0xc000, 0x1000, 0, 3)];
    assert_eq!(view.regions, expected);
    assert_eq!(view.files.len(), MAX_FILES);
    for (number, file) in (0..).zip(&view.files) {
        assert_eq!((first_byte(file), pwrite(file, b"x", 0)), (number, Err(Errno::BADF)));
    }
    let (_link, view) = HostLink::attach(&broker.path, &granted.token, false).unwrap();
    assert!(view.files.iter().all(|file| pwrite(file, b"x", 8) == Ok(1)));
}
