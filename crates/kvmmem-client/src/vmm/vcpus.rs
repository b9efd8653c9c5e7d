// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's questions about a VM's vCPUs, and what answers them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Weak;
use std::time::Duration;

use kvmmem_proto::message::{VcpuAnswer, VcpuQuestion};

/// The most questions that wait; a broker asks fewer.
const MAX_WAITING: usize = 1024;

/// What answers for a VM's vCPUs. Called from one thread of the link's own.
pub trait Vcpus: Send + Sync {
    /// Answers a question of the broker's. May take a few seconds.
    fn answer(&self, question: VcpuQuestion) -> VcpuAnswer;

    /// Ends all pauses: the connection to the broker has ended.
    fn resume_all(&self);

    /// Ends the pauses that were not repeated in time; returns when to call this again.
    fn expire(&self) -> Option<Duration>;
}

/// The questions that wait, and what answers them.
#[derive(Default)]
pub(super) struct Questions {
    pub(super) waiting: VecDeque<(u64, VcpuQuestion)>,
    pub(super) handler: Option<Weak<dyn Vcpus>>,
    /// Whether [`Vcpus::resume_all`] is to be called.
    pub(super) is_lost: bool,
}

impl fmt::Debug for Questions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Questions").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Questions {
    pub(super) fn push(&mut self, id: u64, question: VcpuQuestion) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back((id, question));
        }
    }

    /// What waits is void, and all pauses end.
    pub(super) fn lost(&mut self) {
        self.waiting.clear();
        self.is_lost = true;
    }
}
