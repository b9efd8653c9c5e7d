// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program in the target: what an introspection tool is to find.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result};
use kvmmem::Page;
use kvmmem_probe::{COUNTER, INBOX, MARKER, MARKER_LEN, TargetReport, hex, page_marker};

use crate::{pagemap, say};

/// Places the marker in `count` pages, then counts, and reports what appears in the inbox, until
/// killed.
pub(crate) fn run(count: usize) -> Result<()> {
    let mut marker = [0; MARKER_LEN];
    getrandom::fill(&mut marker).context("cannot get random bytes")?;
    let pages = (0..count.max(1)).map(|_| Page::new()).collect::<Result<Vec<_>, _>>()?;
    for (index, page) in pages.iter().enumerate() {
        page.write(MARKER, &page_marker(&marker, index))?;
    }
    let pagemap = File::open("/proc/self/pagemap").context("cannot open /proc/self/pagemap")?;
    let gpas = pages.iter().map(|page| pagemap::gpa(&pagemap, page)).collect::<Result<_>>()?;
    say(&TargetReport::Marker { gpas, marker: hex(&marker) })?;

    let first = pages.first().context("no page")?;
    let mut inbox = first.read_u64(INBOX)?;
    for count in 1.. {
        first.write_u64(COUNTER, count)?;
        let seen = first.read_u64(INBOX)?;
        if seen != inbox {
            inbox = seen;
            say(&TargetReport::Inbox { value: seen })?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
