// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Identity of a file, independent of its path.

use std::os::fd::AsFd;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

/// Which file: its device and its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl FileId {
    /// Of an open file.
    pub fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }

    /// The same of a file descriptor; `None` where the kernel does not say.
    pub fn of_file(file: impl AsFd) -> Option<Self> {
        rustix::fs::fstat(file).ok().map(|stat| Self::of(&stat))
    }
}
