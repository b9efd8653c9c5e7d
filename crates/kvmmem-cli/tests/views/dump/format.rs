// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ELF cores, LiME files, and what is compressed.

use std::fs;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{dump, hex, part, path};
use crate::common::Host;
use crate::host;

#[test]
fn an_elf_core_has_a_segment_for_each_range() {
    let host = host();
    host.put((4 << 20) - 2, b"data");
    host.put((16 << 20) + 0x5000, b"more");
    let ended = dump(&host, &[], &["--format", "elf", "--range", "3M..5M", "--range", "16M..17M"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let file = fs::read(path(&host)).unwrap();
    let word = |at: usize, size: usize| {
        file[at..at + size].iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
    };
    assert_eq!(&file[..8], b"\x7fELF\x02\x01\x01\x00");
    // ET_CORE, EM_X86_64, the program headers' place, size and number.
    assert_eq!(
        (word(16, 2), word(18, 2), word(32, 8), word(54, 2), word(56, 2)),
        (4, 62, 64, 56, 4)
    );
    // PT_NOTE first; this target has no kernel, so no note.
    assert_eq!((word(64, 4), word(64 + 32, 8)), (4, 0));
    let mut found = Vec::new();
    for header in (64 + 56..).step_by(56).take(3) {
        let [offset, _, paddr, filesz, memsz, align] =
            [8, 16, 24, 32, 40, 48].map(|at| word(header + at, 8));
        assert_eq!((word(header, 4), filesz, align), (1, memsz, 0));
        assert_eq!((offset % 0x1000, paddr % 0x1000), (0, 0));
        let at = usize::try_from(offset).unwrap();
        found.push((paddr, &file[at..at + usize::try_from(filesz).unwrap()]));
    }
    let places: Vec<(u64, usize)> = found.iter().map(|(gpa, bytes)| (*gpa, bytes.len())).collect();
    assert_eq!(places, [(3 << 20, 1 << 20), (4 << 20, 1 << 20), (16 << 20, 1 << 20)]);
    assert_eq!((&found[0].1[(1 << 20) - 2..], &found[1].1[..2]), (&b"da"[..], &b"ta"[..]));
    assert_eq!(&found[2].1[0x5000..0x5004], b"more");
}

/// Puts a kernel into the target at `at`, in units of 2 MiB: its note, its page tables and its
/// name.
fn put_kernel(host: &Host, at: u64, release: &str) -> String {
    let base = at << 21;
    let entry = |table: u64, index: u64, value: u64| {
        host.put(base + table + index * 8, &value.to_le_bytes())
    };
    entry(0x10_1000, 511, (base + 0x10_2000) | 1);
    entry(0x10_2000, 510, (base + 0x10_3000) | 1);
    entry(0x10_3000, 0, base | 1 << 7 | 1);
    host.put(base + 0x5000 + 4 + 130, release.as_bytes());
    let text = format!(
        "OSRELEASE={release}\nSYMBOL(init_uts_ns)=ffffffff80005000\nOFFSET(uts_namespace.name)=4\n\
         SYMBOL(swapper_pg_dir)=ffffffff80101000\nNUMBER(phys_base)={base}\nNUMBER(pgtable_l5_enabled)=0\n"
    );
    let len = u32::try_from(text.len()).unwrap();
    let note =
        [&[11, len, 0].map(u32::to_le_bytes).concat(), &b"VMCOREINFO\0\0"[..], text.as_bytes()]
            .concat();
    host.put(base + 0x8000, &note);
    text
}

#[test]
fn an_elf_core_has_the_kernels_note_if_it_is_known_which() {
    let host = host();
    let elf = |words: &str| {
        let ended = dump(&host, &[], &["--format", "elf", "--json"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        let core = fs::read(path(&host)).unwrap();
        let size = usize::try_from(u64::from_le_bytes(core[96..104].try_into().unwrap())).unwrap();
        let at = usize::try_from(u64::from_le_bytes(core[72..80].try_into().unwrap())).unwrap();
        for file in ["dump", "dump.json"] {
            fs::remove_file(host.path(file)).unwrap();
        }
        (core[at..at + size].to_vec(), record["vmcoreinfo"].clone())
    };
    let text = put_kernel(&host, 2, "6.12.1-one");
    let (note, told) = elf("");
    assert!(note.starts_with(b"\x0b\0\0\0") && note[12..24] == *b"VMCOREINFO\0\0");
    assert_eq!(&note[24..24 + text.len()], text.as_bytes());
    assert_eq!(told, json!({"gpa": "0x408000", "release": "6.12.1-one"}));
    // A forged note does not fit, and is ignored.
    let forged = put_kernel(&host, 1, "6.12.1-two");
    host.put((1 << 21) + 0x5000 + 4 + 130, b"7");
    assert_eq!(elf("").1["release"], "6.12.1-one");
    // The kernel of before a reset, and that after it.
    host.put((1 << 21) + 0x5000 + 4 + 130, b"6");
    let (note, told) = elf("several Linux kernels");
    assert_eq!((note.len(), told), (0, Value::Null), "{forged}");
    // One that does not fit, alone.
    host.put((1 << 21) + 0x8000, b"x");
    host.put((2 << 21) + 0x5000 + 4 + 130, b"7");
    assert_eq!(elf("does not fit its page tables").0.len(), 0);
}

#[test]
fn a_target_without_a_monitor_is_neither_paused_nor_are_its_registers_known() {
    let host = host();
    let file = path(&host);
    let file = file.to_str().unwrap();
    // A token cannot pause the target.
    let ended = dump(&host, &[], &["--pause"]);
    assert_eq!(
        (ended.code, ended.stderr.contains("a token opens memory alone")),
        (Some(2), true),
        "{}",
        ended.stderr
    );
    let ended = host.run(&["dump", file, "--target", "victim", "--pause"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("cannot pause the target") && ended.stderr.contains("QMP"),
        "{}",
        ended.stderr
    );
    assert!(!path(&host).exists());
    for (arguments, words) in
        [(&["--target", "victim"][..], "no QMP connection"), (&[], "a token opens memory alone")]
    {
        let arguments = [&["dump", file, "--format", "elf", "--json"], arguments].concat();
        let ended = if arguments.contains(&"--target") {
            host.run(&arguments)
        } else {
            host.look(&[], &arguments)
        };
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!((&record["registers"]["vcpus"], &record["pause"]), (&json!(0), &Value::Null));
        assert!(record["registers"]["reason"].as_str().unwrap().contains(words), "{record}");
        fs::remove_file(path(&host)).unwrap();
        fs::remove_file(host.path("dump.json")).unwrap();
    }
}

#[test]
fn a_lime_file_is_read_as_it_was_written() {
    let host = host();
    host.put((4 << 20) - 2, b"data");
    host.put((16 << 20) + 0x5000, b"more");
    let ended = dump(&host, &[], &["--format", "lime", "--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    let bytes = fs::read(path(&host)).unwrap();
    assert_eq!(record["sha256"], hex(&Sha256::digest(&bytes)));
    // Three ranges, each with its header.
    assert_eq!(bytes.len(), (12 << 20) + 3 * 32);
    let file = kvmmem_memory::DumpFile::open(&path(&host)).unwrap();
    let read = |gpa| {
        let mut bytes = [0; 4];
        kvmmem_memory::Memory::read_at(&file, gpa, &mut bytes).unwrap();
        bytes
    };
    assert_eq!((&read((4 << 20) - 2), &read((16 << 20) + 0x5000)), (b"data", b"more"));
    assert_eq!(read(0), [0; 4]);
}

#[test]
fn what_is_compressed_unpacks_to_the_same_dump() {
    let host = host();
    for place in [0, (4 << 20) - 2, (16 << 20) + 0x5000] {
        host.put(place, b"data");
    }
    let unpack = |bytes: &[u8]| zstd::decode_all(bytes).unwrap();
    for format in ["raw", "elf", "lime"] {
        assert_eq!(dump(&host, &[], &["--format", format]).code, Some(0));
        let wanted = fs::read(path(&host)).unwrap();
        fs::remove_file(path(&host)).unwrap();
        fs::remove_file(host.path("dump.json")).unwrap();
        let ended = dump(&host, &[], &["--format", format, "--compress", "zstd", "--json"]);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        let file = fs::read(path(&host)).unwrap();
        assert!(unpack(&file) == wanted, "{format}");
        assert_eq!(record["compression"], "zstd");
        assert_eq!(record["compressed_bytes"], file.len());
        assert_eq!(
            (&record["bytes"], &record["sha256"]),
            (&json!(wanted.len()), &json!(hex(&Sha256::digest(&wanted))))
        );
        assert!(!part(&host).exists());
        fs::remove_file(path(&host)).unwrap();
        fs::remove_file(host.path("dump.json")).unwrap();
        let output = host
            .view(&host.grant(&[]).1, &["dump", "-", "--format", format, "--compress", "zstd"])
            .output();
        assert!(unpack(&output.unwrap().stdout) == wanted, "{format}");
    }
}
