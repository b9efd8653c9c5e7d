// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The QEMU of an introspector.

use std::path::PathBuf;

use kvmmem_qemu::find;
use kvmmem_qemu::qmp::Qmp;
use serde_json::Value;

/// The QEMU of an introspector, to be known again over another connection.
#[derive(Clone, Debug)]
pub(super) struct Qemu {
    pub(super) path: PathBuf,
    /// The process that listens, be it QEMU or what has handed it the socket; another one is
    /// another QEMU.
    pub(super) listener: Option<u32>,
    /// Which VM it is by its own answer.
    pub(super) identity: Vec<Value>,
}

impl Qemu {
    /// A new connection to the same QEMU.
    pub(super) fn connect(&self) -> Option<Qmp> {
        let mut qmp = Qmp::connect(&self.path).ok()?;
        let is_same = qmp.listener() == self.listener
            && find::identity(&mut qmp).is_ok_and(|identity| identity == self.identity);
        is_same.then_some(qmp)
    }
}
