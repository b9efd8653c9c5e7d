// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Source of tokens: what the mapping engine and the windows need from the broker.
//!
//! [`TokenSource`] is implemented by the connection to the broker, and by tests.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

use kvmmem_abi::errno::KvmError;
pub use kvmmem_client::vmm::Token;
use kvmmem_client::vmm::{self, Caller, ViewCounters, ViewEvents};
use kvmmem_proto::map::MemoryMap;

/// Memory of one target, opened with a token.
pub trait TargetMemory: Send + Sync {
    /// The source's number for the target.
    fn id(&self) -> u64;

    /// The target's UUID, in the order in which it is printed.
    fn uuid(&self) -> [u8; 16];

    /// Identifies one run of the target: another number once it was reset, its RAM has changed or
    /// it was started again. 0 where that is not known.
    fn generation(&self) -> u64 {
        0
    }

    /// A file that holds some of the target's RAM, by the number that regions have for it; `None`
    /// after the last. It must be sealed against shrinking: a page beyond its end would kill
    /// the VMM by SIGBUS.
    fn file(&self, index: u32) -> Option<BorrowedFd<'_>>;

    /// Where the target's RAM is, and where in which [`TargetMemory::file`].
    fn map(&self) -> &MemoryMap;
}

/// Result of redeeming a token for one page.
pub type PageGrant = vmm::PageGrant<Arc<dyn TargetMemory>>;

/// Result of attaching a view; valid until the grant is revoked.
pub type ViewGrant = vmm::ViewGrant<Arc<dyn TargetMemory>>;

/// Takes the events of grants and targets: those of the broker's connection, and those of targets
/// of another kind.
pub trait TargetEvents: ViewEvents {
    /// Shows what a target's memory is now.
    fn memory_changed(&self, target: &Arc<dyn TargetMemory>);
}

/// Exchanges tokens for memory, and reports revocations to the handler of
/// [`TokenSource::set_events`].
///
/// An event may arrive before its page or view is in the table in which the handler looks. So the
/// caller checks [`TokenSource::is_revoked`] or [`TokenSource::current`] again under the lock that
/// the handler takes: an event that this check misses will find the page or view in the table.
pub trait TokenSource: Send + Sync {
    /// Redeems the token for one page; this uses the token.
    ///
    /// # Errors
    /// [`KvmError::NoEnt`] for a token that is unknown, used or expired, [`KvmError::Again`] if
    /// the broker cannot be asked now, [`KvmError::Perm`] if this machine may not use it,
    /// [`KvmError::OpNotSupp`] if the target's RAM cannot be mapped.
    fn redeem(&self, token: &Token) -> Result<PageGrant, KvmError>;

    /// As [`TokenSource::redeem`] for a token that can be redeemed without waiting; `None` for
    /// others.
    fn claim(&self, _token: &Token) -> Option<PageGrant> {
        None
    }

    /// Number of the connection whose grants and views are valid now.
    fn connection(&self) -> u64 {
        0
    }

    /// Whether a grant was revoked since a token of it was redeemed.
    fn is_revoked(&self, grant: u64) -> bool;

    /// Uses the token to open a view on behalf of `caller`, with no rights but reading if
    /// `read_only`.
    ///
    /// # Errors
    /// As [`TokenSource::redeem`].
    fn attach(
        &self,
        token: &Token,
        caller: &Caller,
        read_only: bool,
    ) -> Result<ViewGrant, KvmError>;

    /// The target of a view as it is now; `None` once the view has ended.
    fn current(&self, view: u64) -> Option<Arc<dyn TargetMemory>>;

    /// Records that a view is closed.
    fn detached(&self, view: u64, counters: ViewCounters);

    /// Records a view's counters.
    fn counters(&self, view: u64, counters: ViewCounters);

    /// Reports events of grants and targets to `handler` from now on.
    fn set_events(&self, handler: Weak<dyn TargetEvents>);
}

/// Device and inode of a file.
pub(crate) fn identity(fd: BorrowedFd<'_>) -> std::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd.as_fd())?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Whether some of a target's memory is in the machine's own file.
pub(crate) fn is_own(target: &dyn TargetMemory, own_file: (u64, u64)) -> std::io::Result<bool> {
    for file in (0..).map_while(|index| target.file(index)) {
        if identity(file)? == own_file {
            return Ok(true);
        }
    }
    Ok(false)
}
