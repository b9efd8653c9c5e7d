// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the mapping engine and the windows need of whoever knows the targets and keeps their
//! grants.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use kvmmem_abi::errno::KvmError;
use kvmmem_client::vmm::{Caller, Scope, Token, ViewCounters};
use kvmmem_proto::map::MemoryMap;

use crate::window::Views;

/// The memory of one target, as a token opened it.
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
    /// behind the last. It must be sealed against shrinking: a page beyond its end would kill
    /// the VMM by SIGBUS.
    fn file(&self, index: u32) -> Option<BorrowedFd<'_>>;

    /// Where the target's RAM is, and where in which [`TargetMemory::file`].
    fn map(&self) -> &MemoryMap;
}

/// What a token opened for one page.
#[derive(Clone)]
pub struct Redeemed {
    /// Number of the grant.
    pub grant: u64,
    /// The target.
    pub target: Arc<dyn TargetMemory>,
    /// Which of its pages may be mapped, and how.
    pub scope: Scope,
}

/// What a token opened for as long as it is not taken back.
#[derive(Clone)]
pub struct Attached {
    /// Number of the view.
    pub view: u64,
    /// Number of the grant.
    pub grant: u64,
    /// The target.
    pub target: Arc<dyn TargetMemory>,
    /// Which of its memory may be shown, and how.
    pub scope: Scope,
}

/// Trades tokens for memory, and takes it back: by what it says to the [`Views`] that it was told
/// of.
///
/// Such an event may come before the page or the view that it concerns is where the handler looks
/// for it. So what has been traded is looked at once more, by [`TokenSource::is_revoked`] or
/// [`TokenSource::current`], under the lock that the handler takes: an event that is not seen there
/// is one that the handler will see.
pub trait TokenSource: Send + Sync {
    /// Uses the token up for one page.
    ///
    /// # Errors
    /// [`KvmError::NoEnt`] for a token that is unknown, used or expired, [`KvmError::Again`] when
    /// nobody can tell now, [`KvmError::Perm`] when this machine may not use it,
    /// [`KvmError::OpNotSupp`] when nobody can map the target's RAM.
    fn redeem(&self, token: &Token) -> Result<Redeemed, KvmError>;

    /// As [`TokenSource::redeem`], for a token that costs no wait; `None` where it would.
    fn claim(&self, _token: &Token) -> Option<Redeemed> {
        None
    }

    /// Which connection's numbers of grants and views count now.
    fn connection(&self) -> u64 {
        0
    }

    /// Whether a grant was taken back since a token of it was redeemed.
    fn is_revoked(&self, grant: u64) -> bool;

    /// Uses the token to open a view on behalf of `caller`, with no rights but reading if
    /// `read_only`.
    ///
    /// # Errors
    /// As [`TokenSource::redeem`].
    fn attach(&self, token: &Token, caller: &Caller, read_only: bool)
    -> Result<Attached, KvmError>;

    /// The target of a view as it is now; `None` once the view has ended.
    fn current(&self, view: u64) -> Option<Arc<dyn TargetMemory>>;

    /// Takes note that a view is closed.
    fn detached(&self, view: u64, counters: ViewCounters);

    /// Takes note of a view's counters.
    fn counters(&self, view: u64, counters: ViewCounters);

    /// Tells `views` from now on of what happens to grants and targets.
    fn set_events(&self, views: Weak<Views>);
}
