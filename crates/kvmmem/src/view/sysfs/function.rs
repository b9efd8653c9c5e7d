// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI functions as the kernel shows them in `/sys/bus/pci/devices`: `ivshmem-plain` and its BAR 2.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// QEMU's `ivshmem`, vendor and device.
const IVSHMEM: [&str; 2] = ["0x1af4", "0x1110"];

/// The line of `resource` that describes BAR 2.
const BAR_LINE: usize = 2;

/// A PCI function that is an `ivshmem`.
#[derive(Clone, Debug)]
pub(super) struct Function {
    folder: PathBuf,
    /// Domain, bus and slot: `0000:01:00`.
    pub(super) slot: String,
    /// The function's number in its slot.
    pub(super) number: u32,
}

/// How BAR 2 is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Uncached: each access is one of the device's, in the program's order.
    Uncached,
    /// Write-combining, where the kernel offers that.
    WriteCombining,
}

impl Function {
    /// The `ivshmem` functions in `folder` that the kernel has given their addresses. One that goes
    /// meanwhile is left out.
    pub(super) fn all(folder: &Path) -> io::Result<Vec<Self>> {
        let entries = fs::read_dir(folder)?;
        Ok(entries.filter_map(|entry| Self::of(&entry.ok()?.path())).collect())
    }

    fn of(folder: &Path) -> Option<Self> {
        let (slot, number) = folder.file_name()?.to_str()?.rsplit_once('.')?;
        let function =
            Self { folder: folder.to_owned(), slot: slot.to_owned(), number: number.parse().ok()? };
        let is = |file: &str, wanted: &str| function.text(file).is_some_and(|id| id == wanted);
        let [vendor, device] = IVSHMEM;
        let is_ivshmem = is("vendor", vendor) && is("device", device);
        // The kernel lists a function first, then gives it addresses, then makes this file.
        (is_ivshmem && function.folder.join("resource2").exists()).then_some(function)
    }

    /// Its address: `0000:01:00.0`.
    pub(super) fn name(&self) -> String {
        format!("{}.{}", self.slot, self.number)
    }

    /// The length of BAR 2; `None` where it has no address.
    pub(super) fn bar_len(&self) -> Option<u64> {
        let text = self.text("resource")?;
        let mut words = text.lines().nth(BAR_LINE)?.split_whitespace().map(|word| {
            word.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok())
        });
        let (first, last) = (words.next()??, words.next()??);
        last.checked_sub(first)?.checked_add(1).filter(|_| first > 0)
    }

    /// The driver that has it.
    pub(super) fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.folder.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Has the device answer to its addresses, as it mostly does already.
    pub(super) fn enable(&self) -> Result<(), Errno> {
        fs::write(self.folder.join("enable"), "1").map_err(|error| {
            match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
                // Without CAP_SYS_ADMIN. Of a mapping it says that the kernel is locked down.
                Errno::PERM => Errno::ACCESS,
                errno => errno,
            }
        })
    }

    /// Opens BAR 2.
    pub(super) fn open(&self, kind: Kind, is_writable: bool) -> Result<OwnedFd, Errno> {
        let access = if is_writable { OFlags::RDWR } else { OFlags::RDONLY };
        let open = |name: &str| {
            rustix::fs::open(self.folder.join(name), access | OFlags::CLOEXEC, Mode::empty())
        };
        if kind == Kind::WriteCombining {
            match open("resource2_wc") {
                Err(Errno::NOENT) => {}
                opened => return opened,
            }
        }
        open("resource2")
    }

    fn text(&self, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.folder.join(file)).ok()?.trim_end().to_owned())
    }
}
