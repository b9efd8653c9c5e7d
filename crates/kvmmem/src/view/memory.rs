// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a view on the host reaches: regions of the memfd of the target's RAM, and the mappings of it in this process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, Instant};

use kvmmem_broker::map::Region;
use kvmmem_sys::foreign::Foreign;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread, pwrite};

use super::range::{Range, first_hole, next_range};
use super::{Event, State, ViewError, ViewOperation};

/// The most bytes that are copied before whoever wants to end the view gets a chance.
const COPY_LIMIT: usize = 1 << 20;

/// How often it is tried to undo a mapping, and how long to wait in between.
const CLEAR_ATTEMPTS: u32 = 100;
const CLEAR_PAUSE: Duration = Duration::from_millis(20);

/// The memory that a view reaches. The methods that end or change it return when no access of this process can see
/// what was before.
#[derive(Debug)]
pub(super) struct Memory {
    /// Held while memory is copied by way of the file.
    reach: RwLock<Reach>,
    /// Locked after `reach`.
    mappings: Mutex<Vec<Mapped>>,
    /// The generation of which [`Memory::wait`] told last. Locked before `reach`.
    told: Mutex<u64>,
    /// Signalled when `reach` has changed.
    changed: Condvar,
}

/// What can be reached.
#[derive(Debug)]
pub(super) struct Reach {
    pub(super) generation: u64,
    pub(super) state: State,
    /// Disjoint, in pages, ascending; none once the view has ended.
    regions: Vec<Region>,
    /// `None` once the view has ended.
    ram: Option<OwnedFd>,
}

/// A mapping in this process, as long as somebody uses it.
#[derive(Debug)]
struct Mapped {
    gpa: u64,
    memory: Weak<Foreign>,
}

impl Memory {
    pub(super) fn new(generation: u64, regions: Vec<Region>, ram: OwnedFd) -> Self {
        let reach = Reach { generation, state: State::Open, regions, ram: Some(ram) };
        Self {
            reach: RwLock::new(reach),
            mappings: Mutex::default(),
            told: Mutex::new(generation),
            changed: Condvar::new(),
        }
    }

    pub(super) fn reach(&self) -> RwLockReadGuard<'_, Reach> {
        self.reach.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies as many bytes as there are in one piece from `gpa` on, and returns how many.
    pub(super) fn read(
        &self,
        operation: ViewOperation,
        gpa: u64,
        buf: &mut [u8],
    ) -> Result<usize, ViewError> {
        let reach = self.reach();
        let (ram, offset, len) = reach.piece(operation, gpa, buf.len())?;
        let part = buf.get_mut(..len).unwrap_or_default();
        retried(|| pread(ram, &mut *part, offset)).map_err(|source| ViewError::System { operation, source })
    }

    /// Copies as many of `bytes` as fit in one piece to `gpa` on, and returns how many.
    pub(super) fn write(&self, operation: ViewOperation, gpa: u64, bytes: &[u8]) -> Result<usize, ViewError> {
        let reach = self.reach();
        let (ram, offset, len) = reach.piece(operation, gpa, bytes.len())?;
        let part = bytes.get(..len).unwrap_or_default();
        retried(|| pwrite(ram, part, offset)).map_err(|source| ViewError::System { operation, source })
    }

    /// The next stretch with data at `gpa` or behind.
    pub(super) fn data_from(&self, operation: ViewOperation, gpa: u64) -> Result<Option<Range>, ViewError> {
        let reach = self.reach();
        let ram = reach.ram(operation)?;
        for region in &reach.regions {
            let Some(part) = next_range(&[range(region)], gpa) else { continue };
            let offset = region.offset + (part.gpa - region.gpa);
            let end = offset + part.len;
            let data = match seek(ram, SeekFrom::Data(offset)) {
                Ok(data) => data.max(offset),
                // There is none up to the file's end.
                Err(Errno::NXIO) => end,
                Err(_) => return Ok(Some(part)),
            };
            if data < end {
                let hole = seek(ram, SeekFrom::Hole(data)).map_or(end, |hole| hole.min(end));
                if hole > data {
                    return Ok(Some(Range { gpa: part.gpa + (data - offset), len: hole - data }));
                }
            }
        }
        Ok(None)
    }

    /// Maps `wanted`, which is made of pages.
    pub(super) fn map(
        &self,
        operation: ViewOperation,
        wanted: Range,
        is_writable: bool,
    ) -> Result<Arc<Foreign>, ViewError> {
        // Held until the mapping is in the list, so that no end of the view comes in between.
        let reach = self.reach();
        reach.ram(operation)?;
        if let Some(gpa) = first_hole(&reach.ranges(), wanted) {
            return Err(ViewError::Hole { operation, gpa });
        }
        let memory = Foreign::reserve(wanted.len, wanted.gpa, is_writable).map(Arc::new);
        let memory = memory.map_err(|source| ViewError::System { operation, source })?;
        reach.place(wanted.gpa, &memory).map_err(|source| ViewError::System { operation, source })?;
        let mut mappings = self.mappings();
        mappings.retain(|mapped| mapped.memory.strong_count() > 0);
        mappings.push(Mapped { gpa: wanted.gpa, memory: Arc::downgrade(&memory) });
        Ok(memory)
    }

    /// Goes over to other regions of the same file.
    pub(super) fn change(&self, generation: u64, regions: Vec<Region>) {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        let is_elsewhere = reach.regions != regions;
        reach.generation = generation.max(reach.generation.saturating_add(1));
        reach.regions = regions;
        for mapped in self.mappings().iter().filter(|_| is_elsewhere) {
            let Some(memory) = mapped.memory.upgrade() else { continue };
            if let Err(error) = reach.place(mapped.gpa, &memory) {
                tracing::error!(%error, gpa = format_args!("{:#x}", mapped.gpa), "a mapping is lost: its memory has moved");
                clear(&memory);
            }
        }
        drop(reach);
        self.tell();
    }

    /// Ends the view; whether nothing of it can be accessed any more.
    pub(super) fn end(&self, state: State) -> bool {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        if reach.state == State::Open {
            reach.generation = reach.generation.saturating_add(1);
            reach.state = state;
        }
        reach.regions.clear();
        reach.ram = None;
        let mappings = std::mem::take(&mut *self.mappings());
        let lost = mappings.iter().filter_map(|mapped| mapped.memory.upgrade());
        let left = lost.filter(|memory| !clear(memory)).count();
        // Only now can anybody see that it has ended.
        drop(reach);
        self.tell();
        left == 0
    }

    /// Waits until something has happened of which it has not told.
    pub(super) fn wait(&self, timeout: Duration) -> Option<Event> {
        let deadline = Instant::now().checked_add(timeout);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let reach = self.reach();
            let (state, generation) = (reach.state, reach.generation);
            drop(reach);
            match state {
                State::Revoked => return Some(Event::Revoked),
                State::Gone => return Some(Event::Gone),
                State::Open if generation > *told => {
                    *told = generation;
                    return Some(Event::Changed);
                }
                State::Open => {}
            }
            let left = deadline.map_or(timeout, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            told = self.changed.wait_timeout(told, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn tell(&self) {
        // With the lock, so that nobody is between looking and waiting.
        let _told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }

    fn mappings(&self) -> MutexGuard<'_, Vec<Mapped>> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reach {
    /// The memory that can be reached.
    pub(super) fn ranges(&self) -> Vec<Range> {
        self.regions.iter().map(range).collect()
    }

    fn ram(&self, operation: ViewOperation) -> Result<&OwnedFd, ViewError> {
        let ended = match self.state {
            State::Revoked => ViewError::Revoked { operation },
            State::Open | State::Gone => ViewError::Gone { operation },
        };
        self.ram.as_ref().ok_or(ended)
    }

    /// The file, the offset in it of `gpa`, and how many bytes, at most `len`, can be copied there at once.
    fn piece(
        &self,
        operation: ViewOperation,
        gpa: u64,
        len: usize,
    ) -> Result<(&OwnedFd, u64, usize), ViewError> {
        let ram = self.ram(operation)?;
        let region = self.regions.iter().find(|region| region.gpa <= gpa && gpa - region.gpa < region.len);
        let region = region.ok_or(ViewError::Hole { operation, gpa })?;
        let within = gpa - region.gpa;
        let left = usize::try_from(region.len - within).unwrap_or(usize::MAX);
        Ok((ram, region.offset + within, len.min(left).min(COPY_LIMIT)))
    }

    /// Makes `memory`, which stands for the addresses from `gpa` on, show what is there now; the rest of it is lost.
    fn place(&self, gpa: u64, memory: &Foreign) -> Result<(), Errno> {
        let Some(ram) = &self.ram else { return memory.clear(0, memory.len()) };
        let (mut at, end) = (gpa, gpa.saturating_add(memory.len()));
        for region in &self.regions {
            let Some(part) = next_range(&[range(region)], at).filter(|part| part.gpa < end) else { continue };
            if part.gpa > at {
                memory.clear(at - gpa, part.gpa - at)?;
            }
            let len = part.len.min(end - part.gpa);
            memory.place(part.gpa - gpa, len, ram.as_fd(), region.offset + (part.gpa - region.gpa))?;
            at = part.gpa + len;
        }
        if at < end { memory.clear(at - gpa, end - at) } else { Ok(()) }
    }
}

fn range(region: &Region) -> Range {
    Range { gpa: region.gpa, len: region.len }
}

/// Whether the mapping is undone, if need be after several attempts: the system may be short of memory.
fn clear(memory: &Foreign) -> bool {
    for _ in 0..CLEAR_ATTEMPTS {
        match memory.clear(0, memory.len()) {
            Ok(()) => return true,
            Err(error) => {
                tracing::error!(%error, address = format_args!("{:#x}", memory.address()), "cannot undo a mapping yet");
            }
        }
        std::thread::sleep(CLEAR_PAUSE);
    }
    false
}

/// The number of bytes that were copied, which is positive.
fn retried(mut copy: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match copy() {
            // The file is sealed against shrinking.
            Ok(0) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use kvmmem_sys::foreign::ForeignError;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const READ: ViewOperation = ViewOperation::Read { gpa: 0, len: 0 };
    const PAGE: u64 = 0x1000;

    /// A file in which every word holds its own offset.
    fn file(pages: u64) -> File {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        for offset in (0..pages * PAGE).step_by(8) {
            file.write_all_at(&offset.to_le_bytes(), offset).unwrap();
        }
        file
    }

    fn region(gpa: u64, pages: u64, offset: u64) -> Region {
        Region { gpa: gpa * PAGE, len: pages * PAGE, offset: offset * PAGE }
    }

    fn memory(regions: &[Region], file: &File) -> Memory {
        Memory::new(4, regions.to_vec(), file.try_clone().unwrap().into())
    }

    fn pages(gpa: u64, pages: u64) -> Range {
        Range { gpa: gpa * PAGE, len: pages * PAGE }
    }

    #[test]
    fn a_mapping_spans_regions_that_lie_apart_in_the_file() {
        let file = file(8);
        let memory = memory(&[region(0, 2, 5), region(2, 1, 0), region(4, 1, 2)], &file);
        let mapping = memory.map(READ, pages(1, 2), true).unwrap();
        assert_eq!(mapping.read_word::<u64>(0x10).unwrap(), 6 * PAGE + 0x10);
        assert_eq!(mapping.read_word::<u64>(PAGE + 0x10).unwrap(), 0x10);
        mapping.write(PAGE - 1, &[0xaa, 0xbb]).unwrap();
        let mut bytes = [0; 1];
        file.read_exact_at(&mut bytes, 7 * PAGE - 1).unwrap();
        assert_eq!(bytes, [0xaa]);
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0xbb]);
        for (range, hole) in [(pages(1, 3), 3), (pages(3, 1), 3), (pages(4, 2), 5), (pages(7, 1), 7)] {
            let error = memory.map(READ, range, true).unwrap_err();
            assert!(matches!(error, ViewError::Hole { gpa, .. } if gpa == hole * PAGE), "{range}: {error}");
        }
    }

    #[test]
    fn mappings_follow_the_regions() {
        let file = file(8);
        let memory = memory(&[region(0, 4, 0)], &file);
        let mapping = memory.map(READ, pages(0, 4), false).unwrap();
        memory.change(6, vec![region(1, 1, 7), region(3, 3, 4)]);
        assert_eq!(memory.reach().ranges(), [pages(1, 1), pages(3, 3)]);
        assert_eq!(mapping.read_word::<u64>(8), Err(ForeignError::Lost { offset: 8 }));
        assert_eq!(mapping.read_word::<u64>(PAGE), Ok(7 * PAGE));
        assert_eq!(mapping.read(PAGE + 8, &mut [0; 0x1000]), Err(ForeignError::Lost { offset: 2 * PAGE }));
        assert_eq!(mapping.read_word::<u64>(3 * PAGE), Ok(4 * PAGE));
        assert_eq!(memory.wait(Duration::ZERO), Some(Event::Changed));
        assert_eq!(memory.wait(Duration::ZERO), None);
        memory.change(8, vec![region(0, 4, 0)]);
        assert_eq!(mapping.read_word::<u64>(8), Ok(8));
        assert_eq!(memory.reach().generation, 8);
    }

    #[test]
    fn after_the_end_nothing_is_left() {
        for (state, event) in [(State::Revoked, Event::Revoked), (State::Gone, Event::Gone)] {
            let memory = memory(&[region(0, 4, 0)], &file(4));
            let mapping = memory.map(READ, pages(0, 4), true).unwrap();
            let dropped = memory.map(READ, pages(0, 1), true).unwrap();
            drop(dropped);
            assert!(memory.end(state));
            assert_eq!(mapping.read(5, &mut [0]), Err(ForeignError::Lost { offset: 5 }));
            assert_eq!(mapping.write(5, &[0]), Err(ForeignError::Lost { offset: 5 }));
            let errors = [
                memory.read(READ, 0, &mut [0]).unwrap_err(),
                memory.write(READ, 0, &[0]).unwrap_err(),
                memory.map(READ, pages(0, 1), false).unwrap_err(),
                memory.data_from(READ, 0).unwrap_err(),
            ];
            for error in errors {
                match state {
                    State::Revoked => assert!(matches!(error, ViewError::Revoked { .. }), "{error}"),
                    _ => assert!(matches!(error, ViewError::Gone { .. }), "{error}"),
                }
            }
            for _ in 0..2 {
                assert_eq!(memory.wait(Duration::ZERO), Some(event));
            }
            // The first end counts.
            assert!(memory.end(State::Gone));
            assert_eq!((memory.reach().state, memory.reach().ranges()), (state, vec![]));
        }
    }

    #[test]
    fn whoever_waits_is_woken() {
        let memory = memory(&[region(0, 1, 0)], &file(1));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| memory.wait(Duration::from_secs(60)));
            std::thread::sleep(Duration::from_millis(20));
            memory.end(State::Revoked);
            assert_eq!(waiter.join().unwrap(), Some(Event::Revoked));
        });
    }

    #[test]
    fn holes_of_the_file_are_no_data() {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(16 * PAGE).unwrap();
        for page in [2, 3, 9] {
            file.write_all_at(&[1], page * PAGE).unwrap();
        }
        // File pages 0 to 3 at 4, 8 to 11 at 8, 2 to 3 of a hole at 20.
        let memory = memory(&[region(4, 4, 0), region(8, 4, 8), region(20, 2, 12)], &file);
        let data = |gpa| memory.data_from(READ, gpa).unwrap();
        assert_eq!(data(0), Some(pages(6, 2)));
        assert_eq!(data(6 * PAGE + 5), Some(Range { gpa: 6 * PAGE + 5, len: 2 * PAGE - 5 }));
        assert_eq!(data(8 * PAGE), Some(pages(9, 1)));
        assert_eq!(data(10 * PAGE), None);
        assert_eq!(data(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn copies_are_those_of_a_plain_buffer(
            lens in proptest::collection::vec((0u64..2, 1u64..3), 1..5),
            gpa in 0u64..0x5000,
            bytes in proptest::collection::vec(any::<u8>(), 0..0x2800),
            by_mapping: bool,
        ) {
            // Regions whose order in the file is the reverse of that in memory.
            let mut end = 0;
            let mut regions: Vec<Region> = lens.iter().map(|&(gap, len)| {
                let region = region(end + gap, len, 0);
                end += gap + len;
                region
            }).collect();
            let mut offset = 0;
            for region in regions.iter_mut().rev() {
                region.offset = offset;
                offset += region.len;
            }
            let file = file(offset / PAGE);
            let memory = memory(&regions, &file);

            // What a process sees who has no mapping: every byte of memory, or a hole.
            let mut model = vec![None; usize::try_from((end + 8) * PAGE).unwrap()];
            for region in &regions {
                let mut content = vec![0; usize::try_from(region.len).unwrap()];
                file.read_exact_at(&mut content, region.offset).unwrap();
                for (at, byte) in (region.gpa..).zip(content) {
                    model[usize::try_from(at).unwrap()] = Some(byte);
                }
            }
            let start = usize::try_from(gpa).unwrap();
            let reachable = model[start..].iter().take(bytes.len()).take_while(|byte| byte.is_some()).count();
            let expected: Vec<u8> = model[start..start + reachable].iter().map(|byte| byte.unwrap()).collect();

            let first = gpa / PAGE;
            let last = (gpa + reachable.max(1) as u64 - 1) / PAGE;
            let mapping = memory.map(READ, pages(first, last - first + 1), true);
            prop_assert_eq!(mapping.is_ok(), reachable > 0 || (model[start].is_some() && bytes.is_empty()));
            let mut found = vec![0; reachable];
            if let (true, Ok(mapping)) = (by_mapping, &mapping) {
                mapping.read(gpa % PAGE, &mut found).unwrap();
                prop_assert_eq!(&found, &expected);
                mapping.write(gpa % PAGE, &bytes[..reachable]).unwrap();
            } else {
                let (mut done, mut buf) = (0, bytes.clone());
                while done < buf.len() {
                    match memory.read(READ, gpa + done as u64, &mut buf[done..]) {
                        Ok(count) => done += count,
                        Err(ViewError::Hole { gpa: hole, .. }) => {
                            prop_assert_eq!(hole, gpa + done as u64);
                            break;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                prop_assert_eq!(done, reachable);
                prop_assert_eq!(&buf[..done], &expected);
                let mut done = 0;
                while done < reachable {
                    done += memory.write(READ, gpa + done as u64, &bytes[done..]).unwrap();
                }
            }
            let mut after = vec![0; reachable];
            let mut done = 0;
            while done < reachable {
                done += memory.read(READ, gpa + done as u64, &mut after[done..]).unwrap();
            }
            prop_assert_eq!(&after, &bytes[..reachable]);
        }
    }
}
