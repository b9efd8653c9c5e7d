// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of windows and views.

use std::io;

use kvmmem_abi::errno::KvmError;
use kvmmem_sys::window::MappingError;

use super::descriptors::{DescriptorsError, MAX_VIEWS};
use super::view::ShowError;

/// Why a machine has no windows.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// The guest's physical addresses end too soon.
    #[error(
        "no guest-physical space is left from {start:#x} on: the guest's addresses have {address_bits} bits; \
         use less RAM, or no windows (--no-window)"
    )]
    NoSpace {
        /// Where windows could begin.
        start: u64,
        /// How many bits there are.
        address_bits: u32,
    },
    /// The descriptor pages could not be made.
    #[error(transparent)]
    Descriptors(#[from] DescriptorsError),
    /// The memory that replaces a target's, the poison, could not be made.
    #[error("cannot make the memory that takes the place of a revoked view's")]
    Poison(#[source] MappingError),
    /// The worker thread could not be started.
    #[error("cannot start the views' thread")]
    Thread(#[source] io::Error),
}

/// Why a view is not attached, searched or detached. The guest gets [`WindowError::number`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum WindowError {
    /// All indices are taken.
    #[error("{MAX_VIEWS} views are open already, the most of one machine")]
    NoDescriptor,
    /// The answer on the token has not come yet: the call is to be made again.
    #[error("the view is being opened")]
    Pending,
    /// The token does not open a view.
    #[error("the token was refused ({})", .0.number())]
    Token(KvmError),
    /// The view's right ended while it was being opened.
    #[error("view {view} ended before it was shown")]
    GenerationEnd { view: u64 },
    /// The host did not tell what the target's memory is.
    #[error("cannot examine the target's memory files")]
    Examine(#[source] io::Error),
    /// The target is this very machine.
    #[error("a machine cannot look at its own memory by a view")]
    OwnMemory,
    /// More ranges than a descriptor holds.
    #[error("the grant reaches {count} ranges; grant fewer at a time")]
    TooManyRanges { count: usize },
    /// The space for windows is full.
    #[error("{len:#x} bytes of guest-physical space are not to be had")]
    NoSpace { len: u64 },
    /// All slots of KVM are in use.
    #[error("all memory slots are taken")]
    NoSlot,
    /// The host refused to show a range.
    #[error("cannot show a range")]
    Show(#[source] ShowError),
    /// Nothing to detach.
    #[error("{gpa:#x} is not the descriptor page of an open view")]
    NoView { gpa: u64 },
    /// Nothing to search.
    #[error("{gpa:#x} is not the descriptor page of an open view, so nothing is searched")]
    NotAView { gpa: u64 },
    /// The view's right has ended.
    #[error("the view at {gpa:#x} has ended")]
    Closed { gpa: u64 },
    /// No data, or no hole, follows.
    #[error("nothing is found from {from:#x} on")]
    NotFound { from: u64 },
    /// The host did not search the target's file.
    #[error("cannot search the target's memory file")]
    Search(#[source] io::Error),
}

impl WindowError {
    /// The error as the guest gets it.
    pub(crate) fn number(&self) -> KvmError {
        match self {
            Self::NoDescriptor
            | Self::NoSpace { .. }
            | Self::NoSlot
            | Self::TooManyRanges { .. } => KvmError::NoMem,
            Self::Token(error) => *error,
            Self::GenerationEnd { .. } | Self::NoView { .. } | Self::NotFound { .. } => {
                KvmError::NoEnt
            }
            Self::Closed { .. } => KvmError::Perm,
            Self::OwnMemory | Self::NotAView { .. } => KvmError::Inval,
            Self::Pending | Self::Examine(_) | Self::Show(_) | Self::Search(_) => KvmError::Again,
        }
    }
}
