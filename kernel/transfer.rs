// SPDX-License-Identifier: GPL-2.0-only
//! Read, write and lseek on a view. A position is a guest-physical address of the target.

use kernel::bindings;
use kernel::prelude::*;
use kernel::time::delay::fsleep;

use crate::abi::hypercall::{SEEK_DATA, SEEK_HOLE};
use crate::contents::{Contents, PAUSE, TRIES};
use crate::sys::iter::UserBuffer;
use crate::sys::task::is_killed;
use crate::view::View;

/// The most that is copied between two looks at the generation.
const CHUNK: usize = 1 << 18;

/// How often a copy begins anew because the view has changed meanwhile.
const CHANGES: u32 = 8;

/// What a step of a transfer came to.
enum Step {
    /// So many bytes of those that were wanted.
    Copied(usize, usize),
    /// The view changed meanwhile.
    Changed,
    /// The host is changing the view.
    Busy,
}

impl View {
    /// Copies between the target's memory from `position` on and a process's: as many bytes as lie
    /// in ranges that follow each other. 0 at the end of the last range when reading, else `ENXIO`
    /// where there is no memory.
    pub(crate) fn transfer(
        &self,
        position: i64,
        len: usize,
        is_write: bool,
        buffer: &mut impl UserBuffer,
    ) -> Result<usize> {
        let number = self.contents().session()?.number;
        let start = u64::try_from(position).map_err(|_| EINVAL)?;
        let (mut done, mut changes, mut pauses) = (0, 0, 0);
        while done < len {
            let gpa = start.checked_add(done as u64).ok_or(EINVAL)?;
            match self.step(number, gpa, len - done, is_write, buffer) {
                Ok(Step::Copied(count, wanted)) => {
                    done += count;
                    // The process's memory may be this file's, or answered for by another process:
                    // the target's memory is not in use here while its pages are got.
                    let is_short = count < wanted && !buffer.fault_in(wanted - count);
                    if is_short && done == 0 {
                        return Err(EFAULT);
                    }
                    if is_short || wanted == 0 || is_killed() {
                        break;
                    }
                }
                Ok(Step::Changed) if changes < CHANGES => changes += 1,
                Ok(Step::Busy) if done == 0 && pauses < TRIES && !is_killed() => {
                    pauses += 1;
                    fsleep(PAUSE);
                }
                Ok(Step::Changed | Step::Busy) if done == 0 => return Err(EAGAIN),
                Err(error) if done == 0 => return Err(error),
                Ok(Step::Changed | Step::Busy) | Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Copies up to [`CHUNK`] bytes, as long as the process's pages are there.
    fn step(
        &self,
        number: usize,
        gpa: u64,
        len: usize,
        is_write: bool,
        buffer: &mut impl UserBuffer,
    ) -> Result<Step> {
        match self.refresh() {
            Err(EAGAIN) => return Ok(Step::Busy),
            result => result?,
        }
        let contents = self.contents();
        let window = contents.window()?;
        let session = contents.session()?;
        if session.number != number {
            return Err(ENOTCONN);
        }
        if is_write && !contents.is_writable() {
            return Err(EACCES);
        }
        if gpa >= window.end() && !is_write {
            return Ok(Step::Copied(0, 0));
        }
        let (memory, offset) = window.find(gpa)?;
        let room = usize::try_from(memory.len().saturating_sub(offset))?;
        let wanted = len.min(CHUNK).min(room);
        let Some(count) = memory.copy(offset, wanted, buffer, || contents.is_current()) else {
            return Ok(Step::Changed);
        };
        let counter = if is_write {
            &session.written_bytes
        } else {
            &session.read_bytes
        };
        counter.add(count);
        Ok(Step::Copied(count, wanted))
    }

    /// The new position. `ENXIO` where there is no data or hole to be found.
    pub(crate) fn seek(&self, current: i64, offset: i64, whence: u32) -> Result<i64> {
        let contents = self.look();
        contents.session()?;
        let position = match whence {
            bindings::SEEK_SET => Some(offset),
            bindings::SEEK_CUR => current.checked_add(offset),
            bindings::SEEK_END => i64::try_from(contents.window()?.end())?.checked_add(offset),
            bindings::SEEK_DATA => Some(i64::try_from(seek_data(&contents, offset)?)?),
            bindings::SEEK_HOLE => Some(i64::try_from(seek_hole(&contents, offset)?)?),
            _ => None,
        };
        position.filter(|position| *position >= 0).ok_or(EINVAL)
    }
}

/// The next data: the host knows which memory the target has never used or has freed.
fn seek_data(contents: &Contents, offset: i64) -> Result<u64> {
    let (window, host) = (contents.window()?, &contents.session()?.host);
    let mut at = u64::try_from(offset).map_err(|_| ENXIO)?;
    loop {
        at = window.first_from(at).ok_or(ENXIO)?;
        match host.seek(at, SEEK_DATA) {
            Ok(None) => return Err(ENXIO),
            Ok(Some(found)) if window.contains(found) => return Ok(found),
            // Between two ranges, of which there are few.
            Ok(Some(found)) => at = found,
            Err(error) if error == EOPNOTSUPP => return Ok(at),
            Err(error) => return Err(error),
        }
    }
}

/// The next hole: of the target's memory or between ranges, also the one behind the last range.
fn seek_hole(contents: &Contents, offset: i64) -> Result<u64> {
    let window = contents.window()?;
    let at = u64::try_from(offset)
        .ok()
        .filter(|at| *at < window.end())
        .ok_or(ENXIO)?;
    let end = window.first_hole_from(at);
    if end == at {
        return Ok(at);
    }
    match contents.session()?.host.seek(at, SEEK_HOLE) {
        Ok(found) => Ok(found.map_or(end, |found| found.min(end))),
        Err(error) if error == EOPNOTSUPP => Ok(end),
        Err(error) => Err(error),
    }
}
