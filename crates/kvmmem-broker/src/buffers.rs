// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buffers for packets, lent to connections only while they read one: thousands are silent for
//! months.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmmem_proto::packet::PacketBuffer;

/// How many are kept for the next one who reads.
const KEPT: usize = 8;

/// Buffers that nobody uses now.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<PacketBuffer>>);

impl Buffers {
    /// Lends a buffer to `use_it`.
    pub(crate) fn lend<T>(&self, use_it: impl FnOnce(&mut PacketBuffer) -> T) -> T {
        let kept = self.lock().pop();
        let mut buffer = kept.unwrap_or_default();
        let result = use_it(&mut buffer);
        let mut kept = self.lock();
        if kept.len() < KEPT {
            kept.push(buffer);
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Vec<PacketBuffer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
