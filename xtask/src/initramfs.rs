// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The initramfs of the test VMs.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use kvmmem_guest::Command;
use kvmmem_guest::report::PROGRAM;

use crate::binaries::Binaries;
use crate::cpio::Archive;
use crate::depends;
use crate::kernel::Kernel;

/// Modules of a KVM host, with vsock to its guests, and of its disk. QEMU emulates AMD's
/// virtualisation only.
pub(crate) const HOST_MODULES: [&str; 3] = ["kvm-amd", "vhost_vsock", "virtio_blk"];

/// Modules of a guest.
const GUEST_MODULES: [&str; 3] = ["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport"];

/// Modules of a guest under a stock QEMU with another kernel than the test bed's.
pub(crate) const QEMU_MODULES: [&str; 2] = ["virtio_pci", "vmw_vsock_virtio_transport"];

/// Programs that guests have in `/bin`, where they have been built.
const GUEST_PROGRAMS: [&str; 4] = ["kvmmem", "kvmmem-probe", "kvmmem-raw", "kvmmem-view"];

/// Writes the initramfs of a guest; an introspector gets our module, too.
pub(crate) fn guest(
    path: &Path,
    kernel: &Kernel,
    binaries: &Binaries,
    module: Option<&Path>,
) -> Result<()> {
    write(path, |archive| {
        init(archive, binaries)?;
        programs(archive, binaries)?;
        let mut order = modules(archive, kernel, &GUEST_MODULES)?;
        if let Some(module) = module {
            archive.copy("modules/kvmmem.ko", 0o644, module)?;
            // May fail: the VM boots, and reports it, if the module finds no host.
            order.push_str("?kvmmem.ko\n");
        }
        Ok(archive.file("modules/order", 0o644, order.as_bytes())?)
    })
}

/// Writes the initramfs of a guest with another kernel, whose modules are these files, in loading
/// order.
pub(crate) fn stock_guest(path: &Path, modules: &[PathBuf], binaries: &Binaries) -> Result<()> {
    write(path, |archive| {
        init(archive, binaries)?;
        programs(archive, binaries)?;
        let order = files(archive, modules)?;
        Ok(archive.file("modules/order", 0o644, order.as_bytes())?)
    })
}

/// Writes the initramfs of a host, with these modules and the folder `bed` at `/bed`, that runs
/// `program`.
pub(crate) fn host(
    path: &Path,
    modules: &[PathBuf],
    binaries: &Binaries,
    bed: &Path,
    program: &Command,
) -> Result<()> {
    write(path, |archive| {
        init(archive, binaries)?;
        let order = files(archive, modules)?;
        archive.file("modules/order", 0o644, order.as_bytes())?;
        archive.file(PROGRAM.trim_start_matches('/'), 0o644, &serde_json::to_vec(program)?)?;
        tree(archive, "bed", bed)
    })
}

fn write(
    path: &Path,
    fill: impl FnOnce(&mut Archive<BufWriter<File>>) -> Result<()>,
) -> Result<()> {
    let make = || {
        let mut archive = Archive::new(BufWriter::new(File::create(path)?));
        fill(&mut archive)?;
        archive.finish()?;
        anyhow::Ok(())
    };
    make().with_context(|| format!("cannot write {}", path.display()))
}

fn init<W: Write>(archive: &mut Archive<W>, binaries: &Binaries) -> io::Result<()> {
    archive.copy("init", 0o755, &binaries.path("kvmmem-guest"))
}

/// Adds modules and what they need; returns their order.
fn modules<W: Write>(archive: &mut Archive<W>, kernel: &Kernel, wanted: &[&str]) -> Result<String> {
    let folder = kernel.modules();
    let dependencies = fs::read_to_string(folder.join("modules.dep")).context("modules.dep")?;
    let order = depends::order(&dependencies, wanted)?;
    let paths: Vec<_> = order.iter().map(|file| folder.join(file)).collect();
    files(archive, &paths)
}

/// Adds modules in loading order; returns that order.
fn files<W: Write>(archive: &mut Archive<W>, modules: &[PathBuf]) -> Result<String> {
    modules.iter().map(|file| module(archive, file)).collect()
}

/// Adds a module; returns its line of the order.
fn module<W: Write>(archive: &mut Archive<W>, file: &Path) -> Result<String> {
    let name = file.file_name().context("modules.dep names no file")?.to_string_lossy();
    archive.copy(&format!("modules/{name}"), 0o644, file)?;
    Ok(format!("{name}\n"))
}

fn programs<W: Write>(archive: &mut Archive<W>, binaries: &Binaries) -> io::Result<()> {
    for name in binaries.names().iter().filter(|name| GUEST_PROGRAMS.contains(name)) {
        archive.copy(&format!("bin/{name}"), 0o755, &binaries.path(name))?;
    }
    Ok(())
}

/// Adds all of a folder.
fn tree<W: Write>(archive: &mut Archive<W>, place: &str, folder: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let place = format!("{place}/{}", entry.file_name().to_string_lossy());
        let metadata = fs::metadata(entry.path())?;
        if metadata.is_dir() {
            tree(archive, &place, &entry.path())?;
        } else {
            archive.copy(&place, metadata.permissions().mode() & 0o777, &entry.path())?;
        }
    }
    Ok(())
}
