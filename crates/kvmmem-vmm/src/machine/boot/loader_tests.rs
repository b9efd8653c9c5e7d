// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that load, and the errors of those that do not.

use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;
use crate::config::{HypercallMethod, ResetPolicy, SerialConfig};

const RAM: usize = 4 << 20;

fn file(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

fn config(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> VmConfig {
    VmConfig {
        kernel: kernel.to_owned(),
        initrd: initrd.map(Path::to_owned),
        cmdline: cmdline.into(),
        memory_bytes: RAM as u64,
        vcpus: 1,
        disks: Vec::new(),
        cid: None,
        serial: SerialConfig::None,
        name: String::new(),
        uuid: [0; 16],
        broker: None,
        introspectable: false,
        introspector: false,
        window: true,
        hypercalls: HypercallMethod::Auto,
        reset: ResetPolicy::Exit,
        sandbox: false,
    }
}

fn load_with(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<LoadedKernel, LoadError> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    load(&config(kernel.path(), initrd.as_ref().map(NamedTempFile::path), cmdline), &memory)
}

/// The least of a bzImage: a setup header, and one sector of setup code and of kernel.
fn bzimage(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = vec![0; 0x400 + 0x1000];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236] = 3;
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    change(&mut image);
    image
}

#[test]
fn a_bzimage_is_entered_in_long_mode_with_its_initrd_on_top() {
    let kernel = load_with(&bzimage(|_| {}), Some(&[7; 5000]), "console=ttyS0").unwrap();
    assert_eq!(kernel.entry, 0x10_0200);
    assert_eq!(kernel.initrd, Some((RAM as u64 - 0x2000, 5000)));
    assert_eq!(kernel.cmdline_len, 13);
}

#[test]
fn errors_name_the_file_and_the_reason() {
    let text = |result: Result<LoadedKernel, LoadError>| result.unwrap_err().to_string();
    assert!(text(load_with(b"", None, "")).contains("neither a bzImage nor a 64-bit ELF"));
    assert!(text(load_with(b"\x7fELF", None, "")).contains("neither"));
    assert!(text(load_with(&[0; 4096], None, "")).contains("neither"));
    assert!(
        text(load_with(&bzimage(|image| image[0x236] = 0), None, ""))
            .contains("no 64-bit entry point")
    );
    let huge = bzimage(|image| image[0x260..0x264].copy_from_slice(&0x4000_0000u32.to_le_bytes()));
    assert!(
        text(load_with(&huge, None, ""))
            .contains("needs 0x40100000 bytes of RAM, there are 0x400000")
    );
    let initrd = vec![0; 0x20_1000];
    assert!(text(load_with(&bzimage(|_| {}), Some(&initrd), "")).contains("bytes of RAM"));
    assert!(
        text(load_with(&bzimage(|_| {}), None, &"x".repeat(2048))).contains("longer than 2047")
    );
    assert!(text(load_with(&bzimage(|_| {}), None, "a\0b")).contains("zero byte"));

    let missing = Path::new("/nonexistent/vmlinuz");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let error = text(load(&config(missing, None, ""), &memory));
    assert!(error.contains("/nonexistent/vmlinuz"), "{error}");
    let kernel = file(&bzimage(|_| {}));
    let error = text(load(&config(kernel.path(), Some(missing), ""), &memory));
    assert!(error.contains("initrd") && error.contains("/nonexistent/vmlinuz"), "{error}");
}

proptest! {
    /// Any header: an error or a kernel, never a panic, and never an entry outside of RAM.
    #[test]
    fn any_image_is_answered(
        is_elf in any::<bool>(),
        header in prop::collection::vec((0usize..0x280, any::<u8>()), 0..12),
        length in 0usize..0x1400,
    ) {
        let mut image = if is_elf { elf() } else { bzimage(|_| {}) };
        for (at, byte) in header {
            if let Some(slot) = image.get_mut(at) {
                *slot = byte;
            }
        }
        image.truncate(length);
        if let Ok(kernel) = load_with(&image, None, "") {
            prop_assert!(kernel.entry < RAM as u64);
        }
    }
}

/// An ELF image with a segment to load and a note.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x1200];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    image[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
    image[32..40].copy_from_slice(&64u64.to_le_bytes());
    image[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
    for (at, kind, offset) in [(64, 1u32, 0x1000u64), (120, 4, 0x1000)] {
        image[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        image[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
        image[at + 16..at + 32].copy_from_slice(&[0x10_0000u64.to_le_bytes(); 2].concat());
        image[at + 32..at + 48].copy_from_slice(&[0x100u64.to_le_bytes(); 2].concat());
    }
    image
}

#[test]
fn an_elf_image_is_entered_where_it_says() {
    assert_eq!(load_with(&elf(), None, "").unwrap().entry, 0x10_0000);
}
