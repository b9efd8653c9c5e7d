// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs of views on the host: a broker and a target without a guest, and the command line as a
//! user runs it.

mod attach;
mod by_name;
#[path = "../common/mod.rs"]
mod common;
mod dump;
mod grant;
mod private;
mod reaching;
mod scan;
mod strings;
mod translate;
mod vcpus;
mod watch;

use std::fs::File;
use std::io::Write;

use kvmmem_client::vmm::Region;

use crate::common::Host;

/// 4 MiB, 4 MiB that follow it at once but lie elsewhere in the file, a hole, 4 MiB.
const REGIONS: [Region; 3] = [
    Region { gpa: 0, len: 4 << 20, offset: 0, file: 0 },
    Region { gpa: 4 << 20, len: 4 << 20, offset: 8 << 20, file: 0 },
    Region { gpa: 16 << 20, len: 4 << 20, offset: 16 << 20, file: 0 },
];

fn host() -> Host {
    Host::start(&REGIONS)
}

/// Enough that a verb can be stopped in the middle, and a disk is full before its end.
const LARGE: [Region; 1] = [Region { gpa: 0, len: 192 << 20, offset: 0, file: 0 }];

/// A target whose pages all have data, each other data: its number from 1 on, as 64-bit words.
fn large() -> Host {
    let host = Host::start(&LARGE);
    let mut ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
    for number in 0..LARGE[0].len / 0x1000 {
        let page = (number + 1).to_le_bytes().repeat(512);
        ram.write_all(&page).unwrap();
    }
    host
}
