// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Nested host: a stock Debian kernel as KVM host under QEMU's software emulation of AMD SVM.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kvmmem_guest::frame::Decoder;
use kvmmem_guest::report::{self, Report};

use crate::{interrupt, tool};

/// The emulator.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// `x86_64` features: SVM with nested paging. Not `max`: its guests' guests die in FPU set-up on
/// QEMU 7.2.
const CPU: &str = "qemu64,+svm,+npt";

/// RAM of the host: guests of several GiB are sparse, but large pages are not.
const MEMORY: &str = "5G";

/// How often the time limit and Ctrl-C are looked at.
const TICK: Duration = Duration::from_millis(200);

/// How long the VM may take to power off after its program has ended.
const POWER_OFF: Duration = Duration::from_secs(60);

/// A nested host to boot.
pub(crate) struct NestedHost<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// A file system that it mounts, read-only.
    pub(crate) disk: Option<&'a Path>,
    /// Gets the kernel's console.
    pub(crate) console: &'a Path,
    pub(crate) limit: Duration,
}

impl NestedHost<'_> {
    /// Boots it, passes on what its program prints (stdout to `out`), and returns the program's
    /// exit code.
    pub(crate) fn run(&self, out: &mut dyn Write) -> Result<i32> {
        let _watch = interrupt::watch()?;
        let mut qemu =
            Emulator(self.command().spawn().with_context(|| format!("cannot run {QEMU}"))?);
        let mut stream = qemu.0.stdout.take().context("no stdout of the emulator")?;
        let (sender, reports) = mpsc::sync_channel(16);
        thread::spawn(move || {
            let mut decoder = Decoder::default();
            loop {
                let report = report::read(&mut stream, &mut decoder);
                let last = !matches!(report, Ok(Some(_)));
                if sender.send(report).is_err() || last {
                    return;
                }
            }
        });
        let deadline = Instant::now() + self.limit;
        loop {
            match reports.recv_timeout(TICK) {
                Ok(Ok(Some(Report::Stdout(bytes)))) => pass_on(out, &bytes)?,
                Ok(Ok(Some(Report::Stderr(bytes)))) => pass_on(&mut std::io::stderr(), &bytes)?,
                Ok(Ok(Some(Report::Exit(status)))) => {
                    qemu.wait(POWER_OFF);
                    return Ok(status.shell_code());
                }
                Ok(Ok(None)) | Err(RecvTimeoutError::Disconnected) => return self.died(&mut qemu),
                Ok(Err(error)) => return Err(error).context("the host VM's report cannot be read"),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if interrupt::was_seen() {
                bail!("interrupted");
            }
            if Instant::now() >= deadline {
                bail!(
                    "the host VM was stopped after its limit of {} s; the end of its console:\n{}",
                    self.limit.as_secs(),
                    tool::tail(self.console)
                );
            }
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(QEMU);
        command
            // One CPU: the kernel patches its own code while another CPU runs it, which QEMU's
            // threads do not get right; with two, the host or a guest died in every
            // third run ("Oops: int3").
            .args(["-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", MEMORY])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            // panic=-1 and -no-reboot: a panic ends the emulator at once.
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 {QUICK} kvmmem.role=host")])
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()))
            .args(["-chardev", "stdio,id=report,signal=off", "-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=report"])
            // Held open: at its end, QEMU closes the report port and its writer in the VM waits for
            // ever.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(disk) = self.disk {
            let drive = format!("if=none,id=disk,format=raw,readonly=on,file={}", disk.display());
            command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"]);
        }
        command
    }

    /// Why the VM ended without a report.
    fn died(&self, qemu: &mut Emulator) -> Result<i32> {
        let status = qemu.wait(POWER_OFF);
        let console =
            String::from_utf8_lossy(&std::fs::read(self.console).unwrap_or_default()).into_owned();
        let how = match status {
            _ if console.contains("Kernel panic") => "the host VM's kernel panicked".to_owned(),
            Some(status) if !status.success() => format!("{QEMU}: {status}"),
            _ => "the host VM went off without reporting its program's end".to_owned(),
        };
        bail!("{how}; the end of its console:\n{}", tool::tail(self.console));
    }
}

/// What makes a kernel quicker under emulation, where nothing is gained by its guards and its
/// waits; and a timer that ticks by itself: one that the kernel sets for each event was lost now
/// and then, and the host stood still for ever.
const QUICK: &str = "mitigations=off nokaslr cryptomgr.notests tsc=reliable no_timer_check nowatchdog \
    highres=off nohz=off";

/// Killed on drop, however we leave.
struct Emulator(Child);

impl Emulator {
    /// Waits for its end, at most for `limit`.
    fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.0.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pass_on(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot write the program's output")
}
