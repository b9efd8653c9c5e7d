// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cuts what a view may show into windows: PCI BARs, whose sizes are powers of two.
//!
//! Nothing outside a grant is ever in a window. Only a grant of all RAM may show more than the
//! RAM's own addresses: what lies between them in the file, as the memory that a PC hides behind
//! its VGA adapter.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use kvmmem_abi::descriptor::{MAX_RANGES, WindowRange};
use kvmmem_proto::map::{PAGE_SIZE, Region};

/// Where both sides are aligned to this, the guest maps with large pages.
const LARGE_PAGE: u64 = 2 << 20;

/// A gap in a file that a grant of all RAM may show rather than go around it.
const SMALL_GAP: u64 = LARGE_PAGE;

/// `f_type` of hugetlbfs (linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A part of one of the target's files, shown as one BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which of the files.
    pub file: u32,
    /// First byte.
    pub offset: u64,
    /// Length: a power of two.
    pub len: u64,
}

/// What is to be known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes.
    pub size: u64,
    /// Bytes of its pages: nothing smaller can be mapped.
    pub page: u64,
}

/// Windows, and what of the target's memory is where in them. The first window is number 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WindowLayout {
    /// The windows, from number 1 on.
    pub windows: Vec<Window>,
    /// What is in them, by ascending address.
    pub ranges: Vec<WindowRange>,
}

/// Why memory cannot be shown as BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowLayoutError {
    /// There is no memory in the scope.
    #[error("the grant reaches none of the target's RAM")]
    Nothing,
    /// The target has no such file.
    #[error("the target's RAM has no file {0}")]
    NoFile(u32),
    /// This QEMU shows files from their beginning only, and this is not all of one.
    #[error(
        "the introspector's QEMU is older than 8.1: it shows whole files only, and the grant is not for all of the target's RAM; grant all RAM, or use a newer QEMU"
    )]
    Partial,
    /// This QEMU shows files from their beginning only, and this file has no size for a BAR.
    #[error(
        "the introspector's QEMU is older than 8.1: it shows only files whose size is a power of two, and the target's RAM is in one of {0:#x} bytes; use a newer QEMU"
    )]
    OddFile(u64),
    /// A range begins or ends within a huge page.
    #[error(
        "the target's RAM is in pages of {page:#x} bytes, and the grant's range at {gpa:#x} does not begin and end with one; grant whole pages"
    )]
    HugePage {
        /// Where the range is in the target.
        gpa: u64,
        /// Size of a page.
        page: u64,
    },
    /// There are more windows or ranges than a descriptor holds.
    #[error(
        "the grant needs {0} windows, each of a power of two, and at most {MAX_RANGES} fit; grant fewer or rounder ranges"
    )]
    TooMany(usize),
}

/// A run of bytes in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    file: u32,
    start: u64,
    end: u64,
}

/// Cuts the regions of a scope. `is_whole` where the scope is all RAM; `has_offset` where QEMU
/// shows parts of files.
pub fn cut(
    regions: &[Region],
    is_whole: bool,
    has_offset: bool,
    shape: impl Fn(u32) -> Option<Shape>,
) -> Result<WindowLayout, WindowLayoutError> {
    let mut shapes = BTreeMap::new();
    for region in regions {
        let file = region.file;
        let shape =
            shape(file).filter(|shape| shape.page.is_power_of_two() && shape.page >= PAGE_SIZE);
        shapes.insert(file, shape.ok_or(WindowLayoutError::NoFile(file))?);
    }
    let mut runs = Vec::new();
    for (file, shape) in &shapes {
        let of_file = || regions.iter().filter(|region| region.file == *file);
        runs.extend(if has_offset {
            parts(*file, *shape, of_file(), is_whole)?
        } else {
            vec![all(*file, *shape, of_file(), is_whole)?]
        });
    }
    let windows: Vec<Window> = runs.into_iter().flat_map(split).collect();
    let ranges = places(regions, &windows);
    if ranges.is_empty() {
        return Err(WindowLayoutError::Nothing);
    }
    match windows.len().max(ranges.len()) {
        pieces if pieces > MAX_RANGES => Err(WindowLayoutError::TooMany(pieces)),
        _ => Ok(WindowLayout { windows, ranges }),
    }
}

/// The runs to be shown of a file, ascending, each of whole pages.
fn parts<'a>(
    file: u32,
    shape: Shape,
    regions: impl Iterator<Item = &'a Region>,
    is_whole: bool,
) -> Result<Vec<Run>, WindowLayoutError> {
    let mut regions: Vec<&Region> = regions.collect();
    regions.sort_unstable_by_key(|region| region.offset);
    let mut runs: Vec<Run> = Vec::new();
    for region in regions {
        let end = region.offset.checked_add(region.len).filter(|end| *end <= shape.size);
        let mut run =
            Run { file, start: region.offset, end: end.ok_or(WindowLayoutError::NoFile(file))? };
        if is_whole {
            run = run.widened(shape);
        }
        if !(run.start | run.end).is_multiple_of(shape.page) {
            return Err(WindowLayoutError::HugePage { gpa: region.gpa, page: shape.page });
        }
        match runs.last_mut() {
            Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
            _ => runs.push(run),
        }
    }
    Ok(runs)
}

/// All of a file, where that may be shown and is a BAR's size.
fn all<'a>(
    file: u32,
    shape: Shape,
    regions: impl Iterator<Item = &'a Region>,
    is_whole: bool,
) -> Result<Run, WindowLayoutError> {
    let shown: u64 = regions.map(|region| region.len).fold(0, u64::saturating_add);
    if !is_whole && shown != shape.size {
        return Err(WindowLayoutError::Partial);
    }
    if !shape.size.is_power_of_two() || shape.size < shape.page {
        return Err(WindowLayoutError::OddFile(shape.size));
    }
    Ok(Run { file, start: 0, end: shape.size })
}

impl Run {
    /// With the small gaps on both sides, or as far as whole pages of the file need it.
    fn widened(self, shape: Shape) -> Self {
        let unit = SMALL_GAP.max(shape.page);
        let start = self.start - self.start % unit;
        let end = self.end.checked_next_multiple_of(unit).unwrap_or(shape.size).min(shape.size);
        Self { start, end, ..self }
    }
}

/// Cuts a run into powers of two: small ones up to the next large page, from there on as large as
/// they come.
fn split(run: Run) -> impl Iterator<Item = Window> {
    let mut offset = run.start;
    std::iter::from_fn(move || {
        let left = run.end.checked_sub(offset).filter(|left| *left > 0)?;
        let largest = 1u64 << left.ilog2();
        let len = match offset % LARGE_PAGE {
            0 => largest,
            _ => largest.min(1 << offset.trailing_zeros()),
        };
        let window = Window { file: run.file, offset, len };
        offset += len;
        Some(window)
    })
}

/// Where the regions are in the windows, by ascending address.
fn places(regions: &[Region], windows: &[Window]) -> Vec<WindowRange> {
    let mut ranges = Vec::new();
    for region in regions {
        for (number, window) in (1u32..).zip(windows) {
            let start = region.offset.max(window.offset);
            let end = (region.offset + region.len).min(window.offset + window.len);
            if window.file == region.file && start < end {
                ranges.push(WindowRange {
                    gpa: region.gpa + (start - region.offset),
                    len: end - start,
                    offset: start - window.offset,
                    window: number,
                });
            }
        }
    }
    ranges.sort_unstable_by_key(|range| range.gpa);
    ranges
}

/// The shape of a file of RAM; `None` where the kernel does not say.
pub fn shape(file: BorrowedFd<'_>) -> Option<Shape> {
    let stat = rustix::fs::fstat(file).ok()?;
    // For a file of huge pages this is their size; for others it may be less or more than a page.
    let is_huge = rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == HUGETLBFS_MAGIC);
    let page = if is_huge { u64::try_from(stat.st_blksize).ok()? } else { PAGE_SIZE };
    Some(Shape { size: u64::try_from(stat.st_size).ok()?, page })
}

#[cfg(test)]
mod tests;
