// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many mappings of one open file at once.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use kvmmem::{PAGE_SIZE, Page, Token};
use kvmmem_abi::ioctl::MapMemToken;
use kvmmem_probe::{MARKER, MARKER_LEN, page_marker};
use kvmmem_sys::device::Device;

use crate::step;
use crate::tokens::Tokens;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The vsock port to listen on for the host; without it the tokens come by standard input.
    #[arg(long)]
    port: Option<u32>,
    /// The marker in hex.
    #[arg(long)]
    marker: String,
    /// A file with the pages' addresses in the target, one a line, in the order of their index.
    #[arg(long)]
    gpas: String,
    /// How many mappings; the pages are taken round robin.
    #[arg(long)]
    mappings: usize,
}

/// An open file and its mapped pages, which outlive it.
pub(crate) struct Crowd {
    device: Device,
    pages: Vec<Page>,
}

impl Crowd {
    fn open() -> Result<Self> {
        Ok(Self { device: Device::open(Path::new("/dev/kvmmem"))?, pages: Vec::new() })
    }

    /// A file with `count` mappings of one page of the target.
    pub(crate) fn of(count: usize, gpa: u64, tokens: &mut Tokens) -> Result<Self> {
        let mut crowd = Self::open()?;
        for number in 0..count {
            crowd.map(tokens.next(count - number)?, gpa)?;
        }
        Ok(crowd)
    }

    pub(crate) fn pages(&self) -> &[Page] {
        &self.pages
    }

    pub(crate) fn unmap(&self, page: &Page) -> Result<()> {
        Ok(self.device.unmap(page)?)
    }

    /// Maps one page more.
    fn map(&mut self, token: Token, gpa: u64) -> Result<()> {
        let page = Page::new()?;
        let number = self.pages.len();
        self.device
            .map(MapMemToken { token: token.words() }, gpa, &page)
            .with_context(|| format!("cannot map page {number} at GPA {gpa:#x}"))?;
        self.pages.push(page);
        Ok(())
    }

    /// Closes the file; what lies in the pages then is to be fresh memory.
    pub(crate) fn close(self) -> Vec<Page> {
        drop(self.device);
        self.pages
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let marker = unhex(&arguments.marker)?;
    let gpas = std::fs::read_to_string(&arguments.gpas)
        .with_context(|| format!("cannot read {}", arguments.gpas))?
        .lines()
        .map(str::parse)
        .collect::<Result<Vec<u64>, _>>()?;
    let mut tokens = Tokens::open(arguments.port)?;
    let mut crowd = Crowd::open()?;
    let count = arguments.mappings;

    step(&format!("{count} pages are mapped at once by one process"), || {
        for (done, gpa) in gpas.iter().cycle().take(count).enumerate() {
            crowd.map(tokens.next(count - done)?, *gpa)?;
        }
        Ok((true, String::new()))
    })?;
    step("each shows the target's page that it should", || {
        let wrong = crowd.pages.iter().enumerate().filter(|(number, page)| {
            let mut seen = [0; MARKER_LEN];
            page.read(MARKER, &mut seen).is_err()
                || seen != page_marker(&marker, number % gpas.len())
        });
        let wrong = wrong.count();
        Ok((wrong == 0 && crowd.pages.len() == count, format!("{wrong} wrong")))
    })?;
    step("the first half is undone by UNMAP", || {
        for page in crowd.pages.iter().take(count / 2) {
            crowd.unmap(page)?;
        }
        Ok((true, String::new()))
    })?;
    step("the other half is undone by closing the file, and all pages are zero", || {
        let pages = crowd.close();
        let mut seen = [0; PAGE_SIZE];
        for page in &pages {
            page.read(0, &mut seen)?;
            ensure!(
                seen.iter().all(|byte| *byte == 0),
                "page at {:#x} is not zero",
                page.address()
            );
        }
        Ok((true, String::new()))
    })?;
    Ok(())
}

fn unhex(text: &str) -> Result<[u8; MARKER_LEN]> {
    let bytes = (0..text.len() / 2)
        .map(|at| u8::from_str_radix(text.get(2 * at..2 * at + 2).unwrap_or(""), 16))
        .collect::<Result<Vec<u8>, _>>()?;
    bytes.try_into().ok().context("the marker is 32 bytes in hex")
}
