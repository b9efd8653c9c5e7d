// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Discovery of a view's devices, by the digest of its ticket.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use kvmmem_abi::descriptor::{
    COMPLAINT_INVALID, COMPLAINT_NO_ADDRESS, DescriptorError, SLOT_WINDOWS,
};
use kvmmem_abi::native::RIGHT_WRITE;
use rustix::io::Errno;

use super::bar::{Bar, IsAlive};
use super::function::{Function, Kind};
use super::head::{self, Head, PageError, Snapshot};

/// How soon they are looked for again.
const PAUSE: Duration = Duration::from_millis(10);

/// Why the devices of a view are not used.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// The kernel does not show them.
    #[error(
        "the host plugged the view in, and this machine's kernel shows no such PCI device: does it have PCI hot plug (dmesg | grep -i pci)?"
    )]
    Absent,
    /// Another driver has one of them.
    #[error(
        "PCI device {device} is the driver {driver}'s; unbind it: echo {device} > /sys/bus/pci/drivers/{driver}/unbind"
    )]
    Bound {
        /// The device's address.
        device: String,
        /// The driver.
        driver: String,
    },
    /// The kernel forbids it.
    #[error(
        "this machine's kernel is locked down and lets no process map PCI devices; load the module kvmmem, which needs no such mapping"
    )]
    LockedDown,
    /// Only root may.
    #[error(
        "without the module kvmmem, only root can map PCI devices: run this as root, run kvmmem proxy as root beside it, or load the module"
    )]
    NotRoot,
    /// A window has no address.
    #[error(
        "PCI device {device} got no address: give its root port a larger pref64-reserve (kvmmem qemu-args)"
    )]
    NoAddress {
        /// The device's address.
        device: String,
    },
    /// The descriptor cannot be.
    #[error("the host describes the view by what cannot be ({0:?})")]
    Invalid(DescriptorError),
    /// Another process has the view.
    #[error("another process has taken the view, by the same ticket")]
    Taken,
    /// Something of the view went at once.
    #[error("the view ended while it was opened")]
    Ended,
    /// The system refused.
    #[error("cannot use PCI device {device}")]
    System {
        /// The device's address.
        device: String,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The devices cannot be listed.
    #[error("cannot list the PCI devices")]
    List(#[source] std::io::Error),
    /// There is no thread left.
    #[error("cannot watch for the view's end")]
    Watch(#[source] std::io::Error),
}

/// Where devices are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bus<'a> {
    pub(super) folder: &'a Path,
    pub(super) is_alive: IsAlive,
    /// How long the kernel may take to show devices that were plugged in.
    pub(super) limit: Duration,
}

/// A view's devices, mapped.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) head: Head,
    /// By their numbers: those in which the view has ranges.
    pub(super) windows: BTreeMap<u32, Bar>,
}

/// The slots of one view.
struct Slots {
    /// Heads by the numbers of their slots, each with the slot's address.
    heads: BTreeMap<u32, (Head, String)>,
    functions: Vec<Function>,
}

impl Bus<'_> {
    /// Waits for the devices of the view with this digest, and maps them; `writes` is whether the
    /// view is to be written where it can be.
    pub(super) fn find(
        &self,
        digest: &[u8; 32],
        writes: bool,
    ) -> Result<(Devices, Snapshot), SysfsError> {
        let deadline = Instant::now() + self.limit;
        loop {
            let is_late = Instant::now() >= deadline;
            if let Some(found) = self.look(digest, writes, is_late)? {
                return Ok(found);
            }
            if is_late {
                return Err(SysfsError::Absent);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// `None` where something is missing that may still come.
    fn look(
        &self,
        digest: &[u8; 32],
        writes: bool,
        is_late: bool,
    ) -> Result<Option<(Devices, Snapshot)>, SysfsError> {
        let functions = Function::all(self.folder).map_err(SysfsError::List)?;
        let mut heads = BTreeMap::new();
        let mut obstacle = None;
        for function in functions.iter().filter(|function| function.number == 0) {
            if function.bar_len() != Some(head::LEN) {
                continue;
            }
            if let Some(driver) = function.driver() {
                obstacle = Some(SysfsError::Bound { device: function.name(), driver });
                continue;
            }
            let head = match Head::map(function, self.is_alive) {
                Ok(head) => head,
                Err(errno) => {
                    match gone_or(function, errno) {
                        // It may be another view's, which is being unplugged.
                        Some(error @ SysfsError::System { .. }) => obstacle = Some(error),
                        Some(error) => return Err(error),
                        None => {}
                    }
                    continue;
                }
            };
            if let Some(number) = head.slot_of(digest) {
                heads.insert(number, (head, function.slot.clone()));
            }
        }
        let slots = Slots { heads, functions };
        match slots.take(writes, self.is_alive, is_late)? {
            None if is_late => obstacle.map_or(Ok(None), Err),
            found => Ok(found),
        }
    }
}

impl Slots {
    fn take(
        mut self,
        writes: bool,
        is_alive: IsAlive,
        is_late: bool,
    ) -> Result<Option<(Devices, Snapshot)>, SysfsError> {
        let Some((head, slot)) = self.heads.get(&0) else { return Ok(None) };
        let length = |number| self.window(number)?.bar_len();
        let snapshot = match head.read(length) {
            Ok(snapshot) => snapshot,
            Err(PageError::Changing) => return Ok(None),
            Err(PageError::Missing(number)) => {
                let Some(function) = self.window(number) else { return Ok(None) };
                // It is there, and has no address.
                head.complain(COMPLAINT_NO_ADDRESS);
                return Err(SysfsError::NoAddress { device: function.name() });
            }
            Err(PageError::Invalid(error)) => {
                head.complain(COMPLAINT_INVALID);
                return Err(SysfsError::Invalid(error));
            }
            Err(PageError::Lost) => return Err(SysfsError::Ended),
        };
        let mut windows = BTreeMap::new();
        for number in snapshot.ranges.iter().map(|range| range.window) {
            let Some(function) = self.window(number) else { return Ok(None) };
            if let Some(driver) = function.driver() {
                let bound = SysfsError::Bound { device: function.name(), driver };
                return if is_late { Err(bound) } else { Ok(None) };
            }
            if let Err(errno) = function.enable() {
                return match gone_or(function, errno) {
                    // EINVAL: the kernel has not given each of its BARs an address yet.
                    Some(SysfsError::System { .. }) if !is_late => Ok(None),
                    error => error.map_or(Ok(None), Err),
                };
            }
            let Some(len) = function.bar_len() else { return Ok(None) };
            windows.insert(number, (function, len));
        }
        match head.claim() {
            Ok(true) => {}
            Ok(false) => return Err(SysfsError::Taken),
            Err(errno) => {
                let device = format!("{slot}.0");
                return Err(SysfsError::System { device, source: errno });
            }
        }
        let is_writable = writes && snapshot.descriptor.rights & RIGHT_WRITE != 0;
        let map = |(number, (function, len)): (u32, (&Function, u64))| {
            let bar = Bar::map(function, len, Kind::WriteCombining, is_writable, is_alive);
            let bar = bar.map_err(|errno| gone_or(function, errno));
            Ok((number, bar.map_err(|error| error.unwrap_or(SysfsError::Ended))?))
        };
        let windows = windows.into_iter().map(map).collect::<Result<_, SysfsError>>()?;
        let Some((head, _)) = self.heads.remove(&0) else { return Ok(None) };
        Ok(Some((Devices { head, windows }, snapshot)))
    }

    /// The function that is a window of the view, from 1 on.
    fn window(&self, number: u32) -> Option<&Function> {
        let index = number.checked_sub(1)?;
        let (_, slot) = self.heads.get(&(index / SLOT_WINDOWS))?;
        let wanted = 1 + index % SLOT_WINDOWS;
        self.functions.iter().find(|it| it.slot == *slot && it.number == wanted)
    }
}

/// What to say of a device that cannot be mapped; `None` where it is gone.
fn gone_or(function: &Function, errno: Errno) -> Option<SysfsError> {
    Some(match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => return None,
        Errno::ACCESS => SysfsError::NotRoot,
        Errno::PERM => SysfsError::LockedDown,
        source => SysfsError::System { device: function.name(), source },
    })
}
