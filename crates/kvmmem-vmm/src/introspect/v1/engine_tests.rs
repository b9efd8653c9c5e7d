// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine against a model, and with many callers at once.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvmmem_abi::errno::KvmError;
use kvmmem_client::vmm::{Region, Scope, Span, ViewEvents};
use kvmmem_proto::map::MemoryMap;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::introspect::views::Views;
use crate::machine::stop::StopHandle;

const RAM_BYTES: u64 = 1 << 20;
const HOLE: u64 = 0x7000;

struct FakeTarget(Vec<GuestRam>, MemoryMap);

/// By which the pages are mapped unless a test says otherwise.
const GRANT: u64 = 7;

impl FakeTarget {
    /// A target whose pages hold their GPA, plus one.
    fn new() -> Arc<Self> {
        let ram = GuestRam::new(RAM_BYTES).unwrap();
        for gpa in (0..RAM_BYTES).step_by(4096) {
            ram.memory().write_obj(gpa + 1, GuestAddress(gpa)).unwrap();
        }
        Arc::new(Self(vec![ram], map()))
    }
}

/// RAM with a hole of one page.
fn map() -> MemoryMap {
    let region = |gpa, end| Region { gpa, len: end - gpa, offset: gpa, file: 0 };
    MemoryMap::new(vec![region(0, HOLE), region(HOLE + 4096, RAM_BYTES)]).unwrap()
}

fn redeemed(target: Arc<FakeTarget>) -> PageGrant {
    PageGrant { grant: GRANT, target, scope: Scope::whole(Rights::ReadWrite) }
}

impl TargetMemory for FakeTarget {
    fn file(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.0.get(index as usize).map(GuestRam::fd)
    }
    fn id(&self) -> u64 {
        1
    }
    fn uuid(&self) -> [u8; 16] {
        [1; 16]
    }
    fn map(&self) -> &MemoryMap {
        &self.1
    }
}

fn engine(limit: usize) -> MappingEngine {
    MappingEngine::new(Arc::new(GuestRam::new(RAM_BYTES).unwrap()), limit).unwrap()
}

fn read(engine: &MappingEngine, gpa: u64) -> u64 {
    engine.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
}

fn write(engine: &MappingEngine, gpa: u64, value: u64) {
    engine.ram.memory().write_obj(value, GuestAddress(gpa)).unwrap();
}

/// Bytes of the machine's own RAM that the host holds.
fn allocated(engine: &MappingEngine) -> i64 {
    rustix::fs::fstat(engine.ram.fd()).unwrap().st_blocks * 512
}

#[test]
fn a_mapping_costs_no_memory_and_leaves_a_zero_page() {
    let (engine, target) = (engine(10), FakeTarget::new());
    write(&engine, 0x3000, 0xaa);
    let before = allocated(&engine);
    engine.map(0x3000, 0x5000, || Ok(redeemed(target.clone())), |_| false).unwrap();
    assert_eq!(allocated(&engine), before - 4096);
    assert_eq!(read(&engine, 0x3000), 0x5001);
    // An introspector of this machine writes into the hole meanwhile.
    let file = std::fs::File::from(engine.ram.fd().try_clone_to_owned().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, &[9], 0x3000).unwrap();
    engine.unmap(0x3000).unwrap();
    assert_eq!(read(&engine, 0x3000), 0);
    assert_eq!(engine.len(), 0);
}

#[test]
fn a_page_that_waits_for_its_token_is_nobody_elses() {
    let (engine, target) = (engine(10), FakeTarget::new());
    let meanwhile = || {
        let second = engine.map(0x3000, 0x6000, || Ok(redeemed(target.clone())), |_| false);
        assert!(matches!(second, Err(MapError::InUse { gpa: 0x3000 })));
        assert!(matches!(engine.unmap(0x3000), Err(MapError::NotMapped { gpa: 0x3000 })));
        Ok(redeemed(target.clone()))
    };
    engine.map(0x3000, 0x5000, meanwhile, |_| false).unwrap();
    assert_eq!(read(&engine, 0x3000), 0x5001);
}

#[test]
fn refusals_leave_the_page_free_and_as_it_was() {
    let (engine, target) = (engine(1), FakeTarget::new());
    write(&engine, 0x3000, 0xaa);
    let unknown = engine.map(0x3000, 0x5000, || Err(MapError::Token(KvmError::NoEnt)), |_| false);
    assert!(matches!(unknown, Err(MapError::Token(KvmError::NoEnt))));
    let hole = engine.map(0x3000, HOLE, || Ok(redeemed(target.clone())), |_| false);
    assert!(matches!(hole, Err(MapError::TargetHole { gpa: HOLE })));

    let own = Arc::new(FakeTarget(vec![GuestRam::new(RAM_BYTES).unwrap()], map()));
    let narcissus = MappingEngine { own_file: identity(own.0[0].fd()).unwrap(), ..self::engine(1) };
    assert!(matches!(
        narcissus.map(0x3000, 0x5000, || Ok(redeemed(own)), |_| false),
        Err(MapError::OwnMemory)
    ));
    assert_eq!(narcissus.len(), 0);

    assert_eq!(read(&engine, 0x3000), 0xaa);
    engine.map(0x3000, 0x5000, || Ok(redeemed(target.clone())), |_| false).unwrap();
    let beyond = engine.map(0x4000, 0x5000, || panic!("the token must not be used up"), |_| false);
    assert!(matches!(beyond, Err(MapError::Limit { limit: 1 })));
    engine.unmap_all().unwrap();
    assert_eq!((engine.len(), read(&engine, 0x3000)), (0, 0));
}

#[test]
fn a_page_is_taken_from_the_file_that_its_region_names() {
    let engine = engine(10);
    let node = |number: u64| {
        let ram = GuestRam::new(RAM_BYTES).unwrap();
        ram.memory().write_obj(number, GuestAddress(0x5000)).unwrap();
        ram
    };
    let region = |gpa, file| Region { gpa, len: RAM_BYTES, offset: 0, file };
    let map = |second| MemoryMap::new(vec![region(0, 0), region(RAM_BYTES, second)]).unwrap();
    let target = Arc::new(FakeTarget(vec![node(10), node(11)], map(1)));
    engine.map(0x3000, 0x5000, || Ok(redeemed(target.clone())), |_| false).unwrap();
    engine.map(0x4000, RAM_BYTES + 0x5000, || Ok(redeemed(target.clone())), |_| false).unwrap();
    assert_eq!((read(&engine, 0x3000), read(&engine, 0x4000)), (10, 11));

    // None of its files may be the machine's own, be the page in it or not.
    let own = MappingEngine { own_file: identity(target.0[1].fd()).unwrap(), ..self::engine(1) };
    let mapped = own.map(0x3000, 0x5000, || Ok(redeemed(target.clone())), |_| false);
    assert!(matches!(mapped, Err(MapError::OwnMemory)));
    let lacking = Arc::new(FakeTarget(vec![node(10)], map(1)));
    let mapped = engine.map(0x6000, RAM_BYTES + 0x5000, || Ok(redeemed(lacking)), |_| false);
    assert!(matches!(mapped, Err(MapError::TargetHole { .. })));
}

#[test]
fn a_grant_reaches_as_far_as_it_says() {
    let (engine, target) = (engine(1), FakeTarget::new());
    let within = |rights, gpa| {
        let scope = Scope { rights, spans: Some(vec![Span { gpa: 0x5000, len: 0x1000 }]) };
        let redeemed = PageGrant { grant: GRANT, target: target.clone(), scope };
        engine.map(0x3000, gpa, || Ok(redeemed), |_| false)
    };
    let read_only = within(Rights::ReadOnly, 0x5000).unwrap_err();
    assert_eq!(read_only.number(), KvmError::Perm);
    let outside = within(Rights::ReadWrite, 0x6000).unwrap_err();
    assert_eq!(outside.number(), KvmError::Fault);
    within(Rights::ReadWrite, 0x5000).unwrap();
}

#[test]
fn a_revoked_grants_pages_are_own_again_and_wait_for_their_unmapping() {
    let (engine, target) = (engine(10), FakeTarget::new());
    let map = |own, grant, is_revoked| {
        let redeemed = PageGrant { grant, ..redeemed(target.clone()) };
        engine.map(own, 0x5000, || Ok(redeemed), |_| is_revoked)
    };
    map(0x1000, 1, false).unwrap();
    map(0x2000, 2, false).unwrap();
    map(0x3000, 1, false).unwrap();
    engine.revoke(1).unwrap();
    assert_eq!([0x1000, 0x2000, 0x3000].map(|gpa| read(&engine, gpa)), [0, 0x5001, 0]);
    // The guest goes on writing: into its own memory.
    write(&engine, 0x1000, 9);
    assert_eq!(target.0[0].memory().read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0x5001);
    assert!(matches!(map(0x1000, 2, false), Err(MapError::InUse { gpa: 0x1000 })));
    engine.unmap(0x1000).unwrap();
    assert_eq!(read(&engine, 0x1000), 0);
    // A revocation that comes between the token and the page.
    write(&engine, 0x1000, 8);
    assert!(matches!(map(0x1000, 3, true), Err(MapError::Revoked { grant: 3 })));
    assert_eq!(read(&engine, 0x1000), 8);
    engine.unmap_all().unwrap();
}

#[test]
fn a_revocation_that_fails_is_not_confirmed_and_ends_the_machine() {
    let (engine, target) = (Arc::new(engine(10)), FakeTarget::new());
    let outside = Page::Mapped { _target: target, grant: GRANT };
    engine.lock().pages.insert(RAM_BYTES, outside);
    let stop = StopHandle::default();
    let views = Views::new(engine, stop.clone());
    assert!(views.revoke(GRANT + 1) && !stop.is_ending());
    assert!(!views.revoke(GRANT) && stop.is_ending());
}

#[test]
fn all_grants_end_at_once_and_with_them_what_was_redeemed() {
    let (engine, target) = (engine(10), FakeTarget::new());
    for (own, grant) in [(0x1000, 1), (0x2000, 2)] {
        let redeemed = PageGrant { grant, ..redeemed(target.clone()) };
        engine.map(own, 0x5000, || Ok(redeemed), |_| false).unwrap();
    }
    engine.revoke_all().unwrap();
    assert_eq!([0x1000, 0x2000].map(|gpa| read(&engine, gpa)), [0, 0]);
    write(&engine, 0x1000, 9);
    assert_eq!(target.0[0].memory().read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0x5001);
    // Revoked pages wait for their unmapping.
    engine.unmap(0x1000).unwrap();
    // The token was redeemed before the end, the page would be mapped after it.
    let late = || {
        engine.revoke_all().unwrap();
        Ok(redeemed(target.clone()))
    };
    let mapped = engine.map(0x3000, 0x5000, late, |_| false);
    assert!(matches!(mapped, Err(MapError::Revoked { grant: GRANT })));
    engine.map(0x3000, 0x5000, || Ok(redeemed(target.clone())), |_| false).unwrap();
    assert_eq!(read(&engine, 0x3000), 0x5001);
}

#[test]
fn all_pages_are_unmapped_at_once_zeroed_or_as_they_are() {
    let (engine, target) = (engine(10), FakeTarget::new());
    let map = |own| engine.map(own, 0x5000, || Ok(redeemed(target.clone())), |_| false).unwrap();
    map(0x1000);
    map(0x2000);
    engine.revoke(GRANT).unwrap();
    write(&engine, 0x1000, 7);
    map(0x3000);
    engine.unmap_all_keeping().unwrap();
    assert_eq!(engine.len(), 0);
    assert_eq!([0x1000, 0x2000, 0x3000].map(|gpa| read(&engine, gpa)), [7, 0, 0x5001]);
    // It is a copy.
    write(&engine, 0x3000, 8);
    assert_eq!(target.0[0].memory().read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0x5001);

    map(0x1000);
    map(0x3000);
    engine.unmap_all().unwrap();
    assert_eq!(([0x1000, 0x3000].map(|gpa| read(&engine, gpa)), engine.len()), ([0, 0], 0));
    // Not a page whose token is being redeemed by another vCPU.
    let meanwhile = || {
        engine.unmap_all().unwrap();
        Ok(redeemed(target.clone()))
    };
    write(&engine, 0x4000, 3);
    engine.map(0x4000, 0x5000, meanwhile, |_| false).unwrap();
    assert_eq!(read(&engine, 0x4000), 0x5001);
}

#[test]
fn racing_callers_share_out_the_pages() {
    let (engine, target) = (engine(100), FakeTarget::new());
    let mapped = AtomicUsize::new(0);
    let unmapped = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            let (engine, target, mapped, unmapped) = (&engine, &target, &mapped, &unmapped);
            scope.spawn(move || {
                for step in 0..2000u64 {
                    let gpa = (step.wrapping_mul(7).wrapping_add(seed * 13) % 8) * 4096;
                    if (step + seed).is_multiple_of(2) {
                        let done = engine.map(gpa, gpa, || Ok(redeemed(target.clone())), |_| false);
                        mapped.fetch_add(usize::from(done.is_ok()), Ordering::SeqCst);
                    } else {
                        unmapped
                            .fetch_add(usize::from(engine.unmap(gpa).is_ok()), Ordering::SeqCst);
                    }
                }
            });
        }
    });
    assert_eq!(engine.len(), mapped.into_inner() - unmapped.into_inner());
    for gpa in (0..8).map(|page| page * 4096) {
        let is_mapped = engine.lock().pages.contains_key(&gpa);
        assert_eq!(read(&engine, gpa), if is_mapped { gpa + 1 } else { 0 });
    }
}

#[derive(Clone, Debug)]
enum Step {
    Map { own: u64, target: u64, is_token_good: bool },
    Unmap { own: u64 },
    Write { own: u64, value: u64 },
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let page = || prop_oneof![8 => (0u64..10).prop_map(|page| page * 4096), 1 => any::<u64>()];
    prop_oneof![
        4 => (page(), page(), prop::bool::weighted(0.8))
            .prop_map(|(own, target, is_token_good)| Step::Map { own, target, is_token_good }),
        4 => page().prop_map(|own| Step::Unmap { own }),
        4 => (0u64..10, any::<u64>()).prop_map(|(page, value)| Step::Write { own: page * 4096, value }),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// What the machine reads is what the model says, after any steps.
    #[test]
    fn the_engine_does_as_the_model(steps in prop::collection::vec(step(), 1..60)) {
        const LIMIT: usize = 4;
        let (engine, fake) = (engine(LIMIT), FakeTarget::new());
        let mut target: HashMap<u64, u64> = (0..256).map(|page| (page * 4096, page * 4096 + 1)).collect();
        let mut own: HashMap<u64, u64> = HashMap::new();
        let mut mapped: HashMap<u64, u64> = HashMap::new();
        let is_page = |gpa: u64| gpa.is_multiple_of(4096) && gpa < RAM_BYTES;
        for step in steps {
            match step {
                Step::Map { own: gpa, target: there, is_token_good } => {
                    let redeem = || match is_token_good {
                        true => Ok(redeemed(fake.clone())),
                        false => Err(MapError::Token(KvmError::NoEnt)),
                    };
                    let done = engine.map(gpa, there, redeem, |_| false);
                    let good = is_page(gpa) && is_page(there) && there != HOLE && is_token_good
                        && !mapped.contains_key(&gpa) && mapped.len() < LIMIT;
                    prop_assert_eq!(done.is_ok(), good, "{:?}", done);
                    if good {
                        mapped.insert(gpa, there);
                        own.remove(&gpa);
                    }
                }
                Step::Unmap { own: gpa } => {
                    prop_assert_eq!(engine.unmap(gpa).is_ok(), mapped.remove(&gpa).is_some());
                }
                Step::Write { own: gpa, value } => {
                    write(&engine, gpa, value);
                    match mapped.get(&gpa) {
                        Some(there) => target.insert(*there, value),
                        None => own.insert(gpa, value),
                    };
                }
                Step::Reset => {
                    engine.unmap_all().unwrap();
                    engine.ram.zero().unwrap();
                    mapped.clear();
                    own.clear();
                }
            }
            for gpa in (0..10).map(|page| page * 4096) {
                let expected = match mapped.get(&gpa) {
                    Some(there) => target[there],
                    None => own.get(&gpa).copied().unwrap_or(0),
                };
                prop_assert_eq!(read(&engine, gpa), expected);
            }
        }
    }
}
