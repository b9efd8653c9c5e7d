// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any dump file: the first byte says of which format it begins.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;
use std::{env, fs, process};

use kvmmem_memory::{DumpFile, Memory};
use libfuzzer_sys::fuzz_target;

/// An ELF core of x86-64 up to its program headers, LiME, nothing.
const BEGINS: [&[u8]; 3] =
    [b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0", b"EMiL\x01\0\0\0", b""];

fuzz_target!(|bytes: &[u8]| {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let path =
        PATH.get_or_init(|| env::temp_dir().join(format!("kvmmem-fuzz-dump-{}", process::id())));
    let Some((begin, rest)) = bytes.split_first() else { return };
    let file = [BEGINS[usize::from(*begin) % BEGINS.len()], rest].concat();
    fs::write(path, file).expect("the folder of temporary files can be written");
    let dump = DumpFile::open(path);
    fs::remove_file(path).expect("the file is there");
    let Ok(dump) = dump else { return };
    let ranges = dump.ranges().expect("the ranges are known");
    assert!(ranges.iter().zip(ranges.iter().skip(1)).all(|(a, b)| a.end() < b.gpa));
    for range in &ranges {
        for gpa in [range.gpa, range.end() - 1] {
            dump.read_at(gpa, &mut [0]).expect("memory in a range can be read");
        }
        assert!(dump.read_at(range.end(), &mut [0]).is_err());
    }
    // Notes that make no sense are an error.
    let _ = dump.vcpus();
    let memory: &dyn Memory = &dump;
    assert!(memory.data().all(|data| data.is_ok()));
});
