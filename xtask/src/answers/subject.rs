// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest whose processes are listed: one that runs, with a core of it, or a core alone.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{Advice, fadvise};

use super::qmp;
use crate::cache::Cache;
use crate::linux::guest::{Guest, Variant};
use crate::linux::kernels::Stock;
use crate::linux::scene;
use crate::process::Process;
use crate::test_bed::TestBed;
use crate::tool::Tool;
use crate::ui;

/// The guest's name, and MiB of its memory.
pub(super) const NAME: &str = "answers";
pub(super) const MEMORY: u32 = 4096;

const VARIANT: Variant = Variant {
    name: NAME,
    kernel: "trixie",
    memory: MEMORY,
    machine: "q35",
    cpu: "max,-la57",
    options: "scene=crowd",
};

pub(super) struct Subject<'a> {
    bed: &'a TestBed,
    log: PathBuf,
    core: PathBuf,
    live: Option<Live>,
}

/// A guest that runs, with a broker that knows it.
pub(super) struct Live {
    stock: Stock,
    guest: Guest,
    socket: PathBuf,
    folder: PathBuf,
    _broker: Process,
}

impl Live {
    /// Where a monitor of the guest listens that the broker does not use: each has one client at a
    /// time.
    pub(super) fn second_monitor(&self) -> PathBuf {
        second_monitor(&self.folder)
    }
}

fn second_monitor(folder: &Path) -> PathBuf {
    folder.join("monitor")
}

impl<'a> Subject<'a> {
    /// The guest whose core this is.
    pub(super) fn of_file(bed: &'a TestBed, core: &Path, log: PathBuf) -> Self {
        Self { bed, log, core: core.to_owned(), live: None }
    }

    /// Boots a guest, and dumps it.
    pub(super) fn boot(
        cache: &Cache,
        bed: &'a TestBed,
        folder: &Path,
        log: PathBuf,
    ) -> Result<Self> {
        let stock = Stock::make(cache, bed, VARIANT.kernel, &log)?;
        let scene = scene(folder, &log)?;
        let (core, socket) = (folder.join("core"), folder.join("broker"));
        let folder = folder.join("guest");
        let monitor = format!("unix:{},server=on,wait=off", second_monitor(&folder).display());
        let monitors = ["-qmp", &monitor, "-qmp", qmp::TCP].map(str::to_owned);
        let guest = ui::step(&format!("answers: a guest with {MEMORY} MiB"), || {
            let mut guest = Guest::start(&VARIANT, &stock, &scene, &folder, &monitors, &log)?;
            guest.truth()?;
            Ok(guest)
        })?;
        let mut broker = Command::new(bed.program("kvmmemd"));
        let mut broker = Process::start(broker.arg("--socket").arg(&socket), &log)?;
        let targets = || {
            Tool::new(bed.program("kvmmem"), &log)
                .env("KVMMEM_BROKER", &socket)
                .args(["target", "list"])
        };
        broker.wait("the broker to listen", || targets().run().is_ok())?;
        let live = Live { stock, guest, socket, folder, _broker: broker };
        let subject = Self { bed, log, core, live: Some(live) };
        if let Some(live) = &subject.live {
            subject.kvmmem().args(["target", "add", "--qmp"]).arg(live.guest.qmp()).run()?;
        }
        let dump = ["dump", "--format", "elf", "--pause", "--target", NAME];
        subject.kvmmem().args(dump).arg(&subject.core).run()?;
        Ok(subject)
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Its core.
    pub(super) fn core(&self) -> &Path {
        &self.core
    }

    pub(super) fn live(&self) -> Option<&Live> {
        self.live.as_ref()
    }

    /// A program, whose messages go to the log.
    pub(super) fn tool(&self, program: &Path) -> Tool {
        Tool::new(program, &self.log)
    }

    /// The command.
    pub(super) fn kvmmem(&self) -> Tool {
        let tool = self.tool(&self.bed.program("kvmmem")).env("KVMMEM_DEVICE", "/nonexistent");
        match &self.live {
            Some(live) => tool.env("KVMMEM_BROKER", &live.socket),
            None => tool,
        }
    }

    /// The debug information of its kernel.
    pub(super) fn debug_information(
        &self,
        cache: &Cache,
        downloads: bool,
    ) -> Result<Option<PathBuf>> {
        let get = |stock: &Stock| {
            stock.debug_information(cache, self.bed, VARIANT.kernel, downloads, &self.log)
        };
        if let Some(live) = &self.live {
            return get(&live.stock);
        }
        let text = self.kvmmem().args(["info", "--json", "--file"]).arg(&self.core).output()?;
        let info: serde_json::Value =
            serde_json::from_str(&text).context("info printed no JSON")?;
        let stock = Stock::make(cache, self.bed, VARIANT.kernel, &self.log)?;
        if info["release"] != stock.release.as_str() {
            bail!("the kernel is {}, and only that of {} is known", info["release"], stock.release);
        }
        get(&stock)
    }

    /// Takes the command and the core out of the page cache.
    pub(super) fn empty_page_cache(&self) -> Result<()> {
        for path in [&self.bed.program("kvmmem"), &self.core] {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            // What is not on disk yet stays.
            file.sync_data()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
        Ok(())
    }
}
