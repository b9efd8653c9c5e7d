// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test bed: kernel, module, programs and images of the test VMs, and the host that runs them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kvmmem_guest::Command;

use crate::binaries::{Binaries, ProgramSet};
use crate::cache::Cache;
use crate::debug_kernel::DebugKernel;
use crate::host_kind::HostKind;
use crate::kernel::Kernel;
use crate::linux::kernels::Stock;
use crate::module::Variant;
use crate::nested::NestedHost;
use crate::provision::Purpose;
use crate::root::Root;
use crate::tool::Tool;
use crate::{direct, initramfs, module, project, provision, qemus, ui};

/// The test bed's folder on an emulated host.
const NESTED_FOLDER: &str = "/bed";

/// A complete test bed.
#[derive(Debug)]
pub(crate) struct TestBed {
    cache: Cache,
    host: HostKind,
    kernel: Kernel,
    binaries: Binaries,
    module: PathBuf,
    selftest_module: PathBuf,
    /// The stock QEMUs, for an emulated host.
    qemus: Option<PathBuf>,
}

/// A program for the test bed's host.
#[derive(Debug)]
pub(crate) struct Job {
    /// Name of a program in the test bed's folder, such as `bin/kvmmem-e2e`.
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    /// Files of this machine to be in the test bed's folder, in `try/`.
    pub(crate) files: Vec<PathBuf>,
    /// Kernel of an emulated host, by the name that [`Stock::make`] takes.
    pub(crate) host: &'static str,
    /// Debian releases whose kernels are to be there for introspectors without the module, in
    /// `kernels/`.
    pub(crate) kernels: &'static [&'static str],
    /// Longest time it may take.
    pub(crate) limit: Duration,
}

impl TestBed {
    /// Makes everything that is missing.
    pub(crate) fn make(wanted: ProgramSet) -> Result<Self> {
        let (host, why) = HostKind::choose();
        ui::say(&format!("Test bed: {}, as {why}.", describe(host)));
        let cache = Cache::open()?;
        let lock = cache.lock()?;
        provision::provision(&cache, Purpose::TestBed)?;
        let kernel = prepared_kernel(&cache)?;
        let module = module::make(&cache, &kernel.build_tree(), Variant::Shipped)?;
        let selftest_module = module::make(&cache, &kernel.build_tree(), Variant::Selftest)?;
        let qemus = (host == HostKind::Nested).then(|| qemus::make(&cache)).transpose()?;
        // Cargo has a lock of its own.
        drop(lock);
        let binaries = Binaries::make(&cache, wanted)?;
        Ok(Self { cache, host, kernel, binaries, module, selftest_module, qemus })
    }

    /// Prints the parts and their paths.
    pub(crate) fn describe(&self) {
        let line =
            |what: &str, value: &dyn std::fmt::Display| ui::say(&format!("  {what:<9} {value}"));
        line("host", &describe(self.host));
        line("cache", &self.cache.folder().display());
        line("kernel", &format!("{} (Debian {})", self.kernel.release(), self.kernel.version()));
        line("image", &self.kernel.image().display());
        line("module", &self.module.display());
        line("programs", &self.binaries.folder().display());
        if let Some(image) = &self.qemus {
            line("QEMUs", &image.display());
        }
    }

    /// The stock kernel.
    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// One of the project's programs.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.binaries.path(name)
    }

    /// Whether its host has stock QEMUs.
    pub(crate) fn has_qemus(&self) -> bool {
        self.qemus.is_some()
    }

    /// Runs the module's selftest: the stock kernel in QEMU, with a device that obeys every
    /// hypercall as the host.
    pub(crate) fn selftest(&self) -> Result<()> {
        let log = self.cache.fresh_log("selftest")?;
        ui::step("kernel/selftest", || {
            Tool::new(project::root().join("kernel/selftest/run.sh"), &log)
                .arg(self.kernel.image())
                .arg(&self.selftest_module)
                .run()
        })
    }

    /// Runs a program on the host, its stdout to `out`; returns its exit code.
    pub(crate) fn run(&self, job: &Job, out: &mut dyn Write) -> Result<i32> {
        let scratch = self.cache.scratch()?;
        let folder = scratch.path().join("bed");
        self.fill(&folder, &job.files)?;
        // Only stock QEMUs boot them.
        for release in job.kernels.iter().filter(|_| self.qemus.is_some()) {
            self.add_kernel(&folder.join("kernels").join(release), release)?;
        }
        match self.host {
            HostKind::Nested => self.run_nested(job, scratch.path(), &folder, out),
            HostKind::Direct => direct::run(job, &folder, out),
        }
    }

    /// Writes the folder that the host's program works with.
    fn fill(&self, folder: &Path, files: &[PathBuf]) -> Result<()> {
        for part in ["bin", "try"] {
            fs::create_dir_all(folder.join(part))?;
        }
        copy(&self.kernel.image(), &folder.join("vmlinuz"))?;
        for name in self.binaries.names() {
            copy(&self.binaries.path(name), &folder.join("bin").join(name))?;
        }
        for file in files {
            let name =
                file.file_name().with_context(|| format!("{} names no file", file.display()))?;
            copy(file, &folder.join("try").join(name))?;
        }
        initramfs::guest(&folder.join("guest.cpio"), &self.kernel, &self.binaries, None)?;
        initramfs::guest(
            &folder.join("introspector.cpio"),
            &self.kernel,
            &self.binaries,
            Some(&self.module),
        )
    }

    /// Writes the kernel of a Debian release, and an introspector's initramfs for it.
    fn add_kernel(&self, folder: &Path, release: &str) -> Result<()> {
        fs::create_dir_all(folder)?;
        let log = self.cache.log(&format!("kernel-{release}"));
        let stock = Stock::make(&self.cache, self, release, &log)?;
        copy(&stock.image(), &folder.join("vmlinuz"))?;
        let modules = stock.modules(&initramfs::QEMU_MODULES)?;
        initramfs::stock_guest(&folder.join("introspector.cpio"), &modules, &self.binaries)
    }

    fn run_nested(
        &self,
        job: &Job,
        scratch: &Path,
        folder: &Path,
        out: &mut dyn Write,
    ) -> Result<i32> {
        let inside = |path: &str| format!("{NESTED_FOLDER}/{path}");
        let mut program = Command::new(inside(&job.program))
            .args(job.args.iter().cloned())
            .env("KVMMEM_TEST_BED", NESTED_FOLDER)
            .env("KVMMEM_TEST_BED_HOST", self.host.name())
            .cwd(NESTED_FOLDER);
        if self.qemus.is_some() {
            program = program.env("KVMMEM_TEST_BED_QEMUS", kvmmem_guest::init::disk::PLACE);
        }
        for name in ["RUST_LOG", "RUST_BACKTRACE"] {
            if let Ok(value) = std::env::var(name) {
                program = program.env(name, value);
            }
        }
        let path = scratch.join("host.cpio");
        let log = self.cache.log(&format!("kernel-{}", job.host));
        let stock = Stock::make(&self.cache, self, job.host, &log)?;
        let modules = stock.modules(&initramfs::HOST_MODULES)?;
        initramfs::host(&path, &modules, &self.binaries, folder, &program)?;
        let console = self.cache.log(&format!("console-{}", std::process::id()));
        let begin = Instant::now();
        let host = NestedHost {
            kernel: &stock.image(),
            initramfs: &path,
            disk: self.qemus.as_deref(),
            console: &console,
            limit: job.limit,
        };
        let code = host.run(out)?;
        // Kept where something went wrong.
        if code == 0 {
            let _ = fs::remove_file(&console);
        } else {
            ui::say(&format!("  the host's console: {}", console.display()));
        }
        ui::say(&format!("  host: {:.1} s", begin.elapsed().as_secs_f64()));
        Ok(code)
    }
}

/// The stock kernel with its root. The cache must be locked.
fn prepared_kernel(cache: &Cache) -> Result<Kernel> {
    Kernel::make(cache, Root::make(cache)?)
}

/// Runs the module's selftest in a debug kernel, which needs nothing else of the test bed, with a
/// random storm of this many minutes.
pub(crate) fn selftest_in_debug_kernel(cache: &Cache, minutes: u32, seed: u32) -> Result<()> {
    let lock = cache.lock()?;
    provision::provision(cache, Purpose::TestBed)?;
    let kernel = prepared_kernel(cache)?;
    let debug = DebugKernel::make(cache, &kernel)?;
    let module = module::make(cache, &debug.build_tree(), Variant::Selftest)?;
    drop(lock);
    let log = cache.fresh_log("selftest-debug")?;
    ui::say(&format!("  where the selftest is: {}", log.display()));
    ui::step(&format!("kernel/selftest in a debug kernel, seed {seed}"), || {
        Tool::new(project::root().join("kernel/selftest/run.sh"), &log)
            .args(["--debug", "--minutes", &minutes.to_string(), "--seed", &seed.to_string()])
            .arg(debug.image())
            .arg(&module)
            .run()
    })
}

/// Builds only the module.
pub(crate) fn make_module() -> Result<PathBuf> {
    let cache = Cache::open()?;
    let _lock = cache.lock()?;
    provision::provision(&cache, Purpose::Build)?;
    module::make(&cache, &prepared_kernel(&cache)?.build_tree(), Variant::Shipped)
}

fn describe(host: HostKind) -> &'static str {
    match host {
        HostKind::Direct => "VMs run directly on this machine",
        HostKind::Nested => "VMs run inside an emulated host (software emulation)",
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
