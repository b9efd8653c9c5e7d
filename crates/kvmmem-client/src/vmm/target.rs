// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Other VMs, whose memory this VM may map or show.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvmmem_proto::map::MemoryMap;
use kvmmem_proto::scope::Scope;
use uuid::Uuid;

/// What a token opened for one page.
#[derive(Clone, Debug)]
pub struct PageGrant<T = Arc<Target>> {
    /// Number of the grant, unique while the broker runs.
    pub grant: u64,
    /// The other VM.
    pub target: T,
    /// Which of its pages may be mapped, and how.
    pub scope: Scope,
}

/// What a token opened until its grant is revoked.
#[derive(Clone, Debug)]
pub struct ViewGrant<T = Arc<Target>> {
    /// Number of the view, unique while the broker runs.
    pub view: u64,
    /// Number of the grant, unique while the broker runs.
    pub grant: u64,
    /// The other VM.
    pub target: T,
    /// Which of its memory may be shown, and how.
    pub scope: Scope,
}

/// Another VM, whose memory this VM may map.
#[derive(Debug)]
pub struct Target {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) uuid: Uuid,
    pub(super) generation: u64,
    pub(super) map: MemoryMap,
    /// Shared by all generations; as many as the memory map names, or more.
    pub(super) files: Arc<[OwnedFd]>,
}

impl Target {
    /// The broker's number for it, unique while the broker runs.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// A memfd of its RAM, by the number that [`super::Region::file`] has for it. It is sealed
    /// against shrinking and covers every region that lies in it, so an access through a mapping of
    /// one never meets the file's end.
    pub fn file(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.files.get(usize::try_from(index).ok()?).map(AsFd::as_fd)
    }

    /// Grows with each change of its RAM, as [`super::ViewEvents::changed`] tells. This object
    /// stays as it was.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Where its RAM is.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The number of the file that holds guest-physical address `gpa`, and the offset in it; `None`
    /// in a hole of the memory map.
    pub fn resolve(&self, gpa: u64) -> Option<(u32, u64)> {
        self.map.resolve(gpa)
    }
}
