// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs of a world that run under stock QEMUs.

use std::time::Instant;

use anyhow::{Context, Result};

use super::{CLI, PROBE, VIEW, World};
use crate::qemu::{Qemu, Spec};

impl World {
    /// The VM of this description, booted if it does not run.
    pub(crate) fn boot_qemu(&mut self, spec: &Spec) -> Result<&mut Qemu> {
        self.qemus.retain_mut(|qemu| qemu.process.is_running());
        if !self.qemus.iter().any(|qemu| qemu.spec == *spec) {
            // One that is described otherwise may have the CID.
            self.qemus.retain(|qemu| qemu.spec.cid != spec.cid);
            let start = Instant::now();
            let qemu = Qemu::boot(&self.bed, *spec, self.run.path())?;
            eprintln!("  booted {} ({:.1} s)", spec.name, start.elapsed().as_secs_f64());
            for (name, path) in [("kvmmem-probe", PROBE), ("kvmmem-view", VIEW), ("kvmmem", CLI)] {
                self.put(&qemu.agent, name, path)?;
            }
            self.qemus.push(qemu);
        }
        self.qemu_mut(spec)
    }

    /// A VM that has been booted.
    pub(crate) fn qemu(&self, spec: &Spec) -> Result<&Qemu> {
        self.qemus.iter().find(|qemu| qemu.spec == *spec).with_context(|| format!("{} is not up", spec.name))
    }

    /// The same, to be changed.
    pub(crate) fn qemu_mut(&mut self, spec: &Spec) -> Result<&mut Qemu> {
        let qemu = self.qemus.iter_mut().find(|qemu| qemu.spec == *spec);
        qemu.with_context(|| format!("{} is not up", spec.name))
    }

    /// Ends a VM.
    pub(crate) fn end_qemu(&mut self, spec: &Spec) {
        self.qemus.retain(|qemu| qemu.spec != *spec);
    }

    /// The ends of their logs, for a failure.
    pub(super) fn qemu_logs(&self) -> String {
        let mut text = String::new();
        for qemu in &self.qemus {
            for kind in ["log", "console"] {
                let path = self.run.path().join(format!("{}.{kind}", qemu.spec.name));
                text += &format!("\n--- {} {kind}\n{}", qemu.spec.name, crate::vm::tail(&path));
            }
        }
        text
    }
}
