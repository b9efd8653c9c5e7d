// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs of views on the host: a broker and a target without a guest, and the command line as a user runs it.

mod attach;
#[path = "../common/mod.rs"]
mod common;
mod dump;
mod grant;
mod scan;
mod translate;
mod watch;

use kvmmem_broker::link::Region;

use crate::common::Host;

/// 4 MiB, 4 MiB that follow it at once but lie elsewhere in the file, a hole, 4 MiB.
const REGIONS: [Region; 3] = [
    Region { gpa: 0, len: 4 << 20, offset: 0 },
    Region { gpa: 4 << 20, len: 4 << 20, offset: 8 << 20 },
    Region { gpa: 16 << 20, len: 4 << 20, offset: 16 << 20 },
];

fn host() -> Host {
    Host::start(&REGIONS)
}
