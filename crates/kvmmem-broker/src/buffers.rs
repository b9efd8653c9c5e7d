// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buffers for packets, lent to connections only while they read one: thousands are silent for
//! months.

use std::sync::Mutex;

use kvmmem_proto::packet::PacketBuffer;

use crate::sync::lock;

/// How many are kept.
const KEPT: usize = 8;

/// Buffers that are not lent.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<PacketBuffer>>);

impl Buffers {
    /// Lends a buffer to `use_it`.
    pub(crate) fn lend<T>(&self, use_it: impl FnOnce(&mut PacketBuffer) -> T) -> T {
        let kept = lock(&self.0).pop();
        let mut buffer = kept.unwrap_or_default();
        let result = use_it(&mut buffer);
        let mut kept = lock(&self.0);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
        result
    }
}
