// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Verbs over KVMI, with a target that the test plays.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::{kvmmem, texts};

const UUID: [u8; 16] = [9; 16];

/// Plays a VM's side with one page of memory at 0, until the tool hangs up; returns the page.
fn serve(path: &Path) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "the tool does not listen: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut hello = [0; 96];
    hello[..4].copy_from_slice(&96u32.to_le_bytes());
    hello[4..20].copy_from_slice(&UUID);
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut [0; 24]).unwrap();

    let mut memory: Vec<u8> = (0..4096u16).map(|i| i.to_le_bytes()[0]).collect();
    let mut header = [0; 8];
    while stream.read_exact(&mut header).is_ok() {
        let mut payload = vec![0; usize::from(u16::from_le_bytes([header[2], header[3]]))];
        stream.read_exact(&mut payload).unwrap();
        let word = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        let (mut err, mut data) = (0, Vec::new());
        match header[0] {
            2 => data.extend([1, 0, 0, 0, 0, 0, 0, 0]),
            17 | 18 => {
                let (start, size) =
                    (usize::try_from(word(0)).unwrap(), usize::try_from(word(8)).unwrap());
                match memory.get_mut(start..start + size) {
                    None => err = -22,
                    Some(place) if header[0] == 17 => data.extend_from_slice(place),
                    Some(place) => place.copy_from_slice(&payload[16..]),
                }
            }
            id => panic!("unexpected command {id}"),
        }
        let size = u16::try_from(8 + data.len()).unwrap().to_le_bytes();
        let reply =
            [&header[..2], &size, &header[4..], &i32::to_le_bytes(err), &[0; 4], &data].concat();
        stream.write_all(&reply).unwrap();
    }
    memory
}

/// Runs a tool's verb against [`serve`].
fn with_target(arguments: &[&str]) -> ((Option<i32>, String, String), Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tool.sock");
    let endpoint = format!("unix:{}", path.display());
    let child = kvmmem(arguments).args(["--listen", &endpoint]).spawn().unwrap();
    let memory = serve(&path);
    (texts(child.wait_with_output().unwrap()), memory)
}

#[test]
fn read_prints_a_dump_or_json() {
    let ((code, stdout, stderr), _) = with_target(&["read", "0x40", "20"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(
        stdout,
        "000000000040  40 41 42 43 44 45 46 47  48 49 4a 4b 4c 4d 4e 4f  |@ABCDEFGHIJKLMNO|\n\
         000000000050  50 51 52 53                                       |PQRS|\n"
    );
    let ((code, stdout, _), _) = with_target(&["--json", "read", "64", "0x4"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "{\"gpa\":\"0x40\",\"hex\":\"40414243\"}\n"));
}

#[test]
fn read_of_a_hole_is_an_error_with_the_address() {
    let ((code, _, stderr), _) = with_target(&["read", "0x7000", "8"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("gpa 0x7000") && stderr.contains("EINVAL"), "{stderr}");
}

#[test]
fn translate_reads_tables_over_kvmi_too() {
    let ((code, stdout, stderr), _) = with_target(&["translate", "0", "8"]);
    assert_eq!((code, stderr.as_str()), (Some(3), ""));
    let entry = "the PML4E 0x706050403020100 at gpa 0x0 is not present";
    assert!(
        stdout.starts_with(&format!("0x0000000000000008  gva 0x8 is not mapped: {entry};")),
        "{stdout}"
    );
}

#[test]
fn write_reaches_the_target() {
    let ((code, stdout, _), memory) = with_target(&["write", "0x10", "c0ffee"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "wrote 3 bytes at 0x10\n"));
    assert_eq!(memory[0x0f..0x14], [0x0f, 0xc0, 0xff, 0xee, 0x13]);
}
