// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the mapping engine needs of whoever knows the targets.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvmmem_abi::errno::KvmError;
use kvmmem_broker::link::Token;

/// The memory of one target, as a token opened it.
pub trait TargetMemory: Send + Sync {
    /// The file that holds the target's RAM. It must be sealed against shrinking: a page beyond its end would kill
    /// the VMM by SIGBUS.
    fn ram(&self) -> BorrowedFd<'_>;

    /// Offset in [`TargetMemory::ram`] of the page at `gpa` (page-aligned); `None` in a hole of the target's memory map.
    fn resolve(&self, gpa: u64) -> Option<u64>;
}

/// Redeems tokens.
pub trait TokenSource: Send + Sync {
    /// Uses the token up and returns the target that it opens.
    ///
    /// # Errors
    /// [`KvmError::NoEnt`] for a token that is unknown, used or expired, [`KvmError::Again`] when nobody can tell now,
    /// [`KvmError::Perm`] when this machine may not use it.
    fn redeem(&self, token: &Token) -> Result<Arc<dyn TargetMemory>, KvmError>;
}
