// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text of QEMU's monitor command `info mtree -f`: what a guest finds at each guest-physical
//! address.
//!
//! A view begins with `FlatView #N`, names the address spaces that have it (` AS "memory", root:
//! system`), and lists ranges (`  0000000000000000-00000000000c2fff (prio 0, ram): mem
//! @0000000000000000 KVM`), the last address included.

/// The most ranges of a view.
const MAX_RANGES: usize = 4096;

/// A range of a flat view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatRange {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length, bytes.
    pub len: u64,
    /// Whether memory is there, be it that the guest may write or not, and no device.
    pub is_memory: bool,
    /// Name of the memory region, as a rule the id of its backend or the path that ends in it.
    pub name: String,
    /// Place of the first byte in that region.
    pub offset: u64,
}

/// Why there is no flat view.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MtreeError {
    /// No view belongs to the address space of the CPUs.
    #[error("QEMU's memory tree has no view of address space \"memory\"")]
    NoView,
    /// A line is not what QEMU writes.
    #[error("QEMU's memory tree has the line {0:?}, which is not a range")]
    Line(String),
    /// There are more than `MAX_RANGES`.
    #[error("QEMU's memory tree has more than {MAX_RANGES} ranges")]
    TooMany,
    /// A range starts before the end of the one above it.
    #[error(
        "QEMU's memory tree has a range at gpa {0:#x} that overlaps or precedes the one above it"
    )]
    Order(u64),
}

/// The flat view of the address space `memory`, by ascending address.
pub fn parse(text: &str) -> Result<Vec<FlatRange>, MtreeError> {
    let view = text.split("FlatView #").find(|view| {
        view.lines().any(|line| line.trim_end().starts_with(" AS \"memory\", root: system"))
    });
    let lines = view.ok_or(MtreeError::NoView)?.lines().filter(|line| {
        line.starts_with("  ") && line.trim_start().starts_with(|c: char| c.is_ascii_hexdigit())
    });
    let mut ranges: Vec<FlatRange> = Vec::new();
    for line in lines {
        if ranges.len() >= MAX_RANGES {
            return Err(MtreeError::TooMany);
        }
        let range =
            range(line).ok_or_else(|| MtreeError::Line(line.trim().chars().take(80).collect()))?;
        if ranges.last().is_some_and(|last| last.gpa.saturating_add(last.len) > range.gpa) {
            return Err(MtreeError::Order(range.gpa));
        }
        ranges.push(range);
    }
    Ok(ranges)
}

fn range(line: &str) -> Option<FlatRange> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (place, rest) = line.trim_start().split_once(" (prio ")?;
    let (start, last) = place.split_once('-')?;
    let (kind, rest) = rest.split_once("): ")?;
    let kind = kind.split_once(", ")?.1;
    let kind = kind.strip_prefix("nv-").unwrap_or(kind);
    // Only names that a backend can have are of interest, and those have no blank.
    let mut words = rest.split(' ');
    let name = words.next()?.to_owned();
    let offset = match words.find_map(|word| word.strip_prefix('@')) {
        Some(offset) => hex(offset)?,
        None => 0,
    };
    let gpa = hex(start)?;
    let len = hex(last)?.checked_sub(gpa)?.saturating_add(1).min(u64::MAX - gpa);
    offset.checked_add(len)?;
    Some(FlatRange { gpa, len, is_memory: matches!(kind, "ram" | "rom"), name, offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "\
FlatView #0
 AS \"mch\", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): mem KVM
  00000000000c3000-00000000000effff (prio 0, rom): mem @00000000000c3000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): mem @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram owner:{obj path=/machine}
  0000000100000000-00000001bfffffff (prio 0, nv-ram): mem @0000000080000000

FlatView #2
 AS \"I/O\", root: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
";

    #[test]
    fn the_memory_of_the_cpus_is_read() {
        let ranges = parse(TEXT).unwrap();
        assert_eq!(ranges.len(), 6);
        let range =
            |n: usize| (ranges[n].gpa, ranges[n].len, ranges[n].offset, ranges[n].is_memory);
        assert_eq!(range(0), (0, 0xc3000, 0, true));
        assert_eq!(range(1), (0xc3000, 0x2d000, 0xc3000, true));
        assert_eq!(range(3), (0xb000_0000, 0x1000_0000, 0, false));
        assert_eq!(range(5), (0x1_0000_0000, 0xc000_0000, 0x8000_0000, true));
        assert_eq!((ranges[0].name.as_str(), ranges[4].name.as_str()), ("mem", "vga.vram"));
    }

    #[test]
    fn what_qemu_does_not_write_is_refused() {
        assert_eq!(parse(""), Err(MtreeError::NoView));
        assert_eq!(parse(&TEXT.replace("\"memory\"", "\"memery\"")), Err(MtreeError::NoView));
        let change = |from: &str, to: &str| parse(&TEXT.replace(from, to)).unwrap_err();
        assert!(matches!(change("00c2fff (", "00c2fff <"), MtreeError::Line(_)));
        assert!(matches!(change("@0000000000100000", "@ffffffffffffffff"), MtreeError::Line(_)));
        assert!(matches!(change("-000000007fffffff", "-0000000000000000"), MtreeError::Line(_)));
        assert!(matches!(
            change("-00000000000c2fff", "-00000000000c4fff"),
            MtreeError::Order(0xc3000)
        ));
        let line = "  0000000000000000-0000000000000fff (prio 0, i/o): x\n";
        let many: String = (0..5000u64)
            .map(|n| {
                line.replace(
                    "0000000000000000-0000000000000fff",
                    &format!("{:016x}-{:016x}", n << 12, (n << 12) + 1),
                )
            })
            .collect();
        assert_eq!(
            parse(&format!("FlatView #0\n AS \"memory\", root: system\n{many}")),
            Err(MtreeError::TooMany)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in "(FlatView #1\n AS \"memory\", root: system\n)?([ 0-9a-f@():,/-]|prio|ram|\n){0,100}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_damage_is_survived(at in 0usize..1200, with: char) {
            let text: String = TEXT.chars().enumerate().map(|(n, c)| if n == at { with } else { c }).collect();
            let _ = parse(&text);
        }
    }
}
