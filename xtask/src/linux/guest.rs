// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest of suite `linux`: a Debian kernel in this machine's QEMU, without hardware
//! virtualisation, that plays `tests/linux/scene.c` and then keeps still.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::kernels::{MODULES, Stock};
use super::truth::Truth;
use crate::cpio::Archive;
use crate::process::Process;
use crate::{nested, tool};

/// What the scene prints.
const READY: &[u8] = b"SCENE READY";
const FAILED: [&[u8]; 2] = [b"SCENE FAILED", b"Kernel panic"];

/// Room for the truth.
const TRUTH_SIZE: u64 = 64 << 20;

/// The kernel's options of every guest: quicker under emulation, and /dev/kmsg takes all that is
/// written.
const QUICK: &str = "console=ttyS0 quiet panic=-1 rdinit=/bin/scene printk.devkmsg=on cryptomgr.notests tsc=reliable \
    no_timer_check nowatchdog";

/// How a guest is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    /// Its name, of letters that a VM's name may have.
    pub(crate) name: &'static str,
    /// The Debian release that its kernel is of; "test bed" is the test bed's own.
    pub(crate) kernel: &'static str,
    /// MiB of RAM.
    pub(crate) memory: u32,
    /// `pc` or `q35`.
    pub(crate) machine: &'static str,
    /// QEMU's `-cpu`.
    pub(crate) cpu: &'static str,
    /// More options of the kernel.
    pub(crate) options: &'static str,
}

/// A guest that runs. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    qemu: Process,
    folder: PathBuf,
}

impl Guest {
    /// Starts QEMU; `folder` is the guest's own, `scene` the program, `more` are further options of
    /// QEMU.
    pub(crate) fn start(
        variant: &Variant,
        stock: &Stock,
        scene: &Path,
        folder: &Path,
        more: &[String],
        log: &Path,
    ) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let file = |name: &str| folder.join(name).display().to_string();
        initramfs(&folder.join("initrd"), stock, scene)?;
        File::create(folder.join("truth"))?.set_len(TRUTH_SIZE)?;
        let ram = format!("memory-backend-memfd,id=ram,size={}M,share=on", variant.memory);
        let mut qemu = Command::new(nested::QEMU);
        qemu.args([
            "-accel",
            "tcg",
            "-cpu",
            variant.cpu,
            "-smp",
            "1",
            "-m",
            &format!("{}M", variant.memory),
        ])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-name", &format!("guest={}", variant.name), "-object", &ram])
        .args(["-machine", &format!("{},memory-backend=ram", variant.machine)])
        .args([
            "-append",
            &format!("{QUICK} {}", variant.options),
            "-initrd",
            &file("initrd"),
            "-kernel",
        ])
        .arg(stock.image())
        .args(["-serial", &format!("file:{}", file("console"))])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", file("qmp"))])
        .args(["-drive", &format!("if=virtio,format=raw,file={}", file("truth"))])
        .args(more);
        Ok(Self { qemu: Process::start(&mut qemu, log)?, folder: folder.to_owned() })
    }

    /// Waits until the scene is there, and reads what the guest itself shows of it.
    pub(crate) fn truth(&mut self) -> Result<Truth> {
        let console = self.folder.join("console");
        let text = || fs::read(&console).unwrap_or_default();
        let has = |text: &[u8], mark: &[u8]| text.windows(mark.len()).any(|part| part == mark);
        let ended = |text: &[u8]| has(text, READY) || FAILED.iter().any(|mark| has(text, mark));
        let waited = self.qemu.wait("the guest's scene", || ended(&text()));
        let waited = waited.and_then(|()| {
            ensure!(has(&text(), READY), "the guest failed");
            Ok(())
        });
        waited.with_context(|| format!("the guest's console:\n{}", tool::tail(&console)))?;
        Truth::parse(&fs::read(self.folder.join("truth"))?)
    }

    /// Where its monitor listens.
    pub(crate) fn qmp(&self) -> PathBuf {
        self.folder.join("qmp")
    }
}

/// Writes the initial RAM disk.
fn initramfs(path: &Path, stock: &Stock, scene: &Path) -> Result<()> {
    let mut archive = Archive::new(std::io::BufWriter::new(File::create(path)?));
    archive.copy("bin/scene", 0o755, scene)?;
    let mut order = String::new();
    for module in stock.modules(&MODULES)? {
        let name =
            module.file_name().context("modules.dep names no file")?.to_string_lossy().into_owned();
        archive.copy(&format!("modules/{name}"), 0o644, &module)?;
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()?;
    Ok(())
}
