// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs of a world that run under stock QEMUs.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use kvmmem_guest::{Agent, Command as GuestCommand};

use super::{RAW, TARGET, VIEW, World};
use crate::qemu::{Qemu, Spec};
use crate::raw::Raw;
use crate::{internal_error, wait};

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
            self.qemus.push(qemu);
        }
        self.qemu_mut(spec)
    }

    /// Where the VMs' consoles and logs are.
    pub(crate) fn run_folder(&self) -> PathBuf {
        self.run.path().to_owned()
    }

    /// A VM that has been booted.
    pub(crate) fn qemu(&self, spec: &Spec) -> Result<&Qemu> {
        self.qemus
            .iter()
            .find(|qemu| qemu.spec == *spec)
            .with_context(|| format!("{} is not up", spec.name))
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

    /// The agent in such a VM, or in the introspector.
    pub(crate) fn agent_of(&self, spec: Option<&Spec>) -> Result<&Agent> {
        match spec {
            Some(spec) => Ok(&self.qemu(spec)?.agent),
            None => self.agent(),
        }
    }

    /// A vsock endpoint in such a VM that the target is hooked to from now on, and its port.
    pub(crate) fn qemu_hook(&mut self, spec: &Spec) -> Result<(String, u32)> {
        self.next_port += 1;
        let endpoint = format!("vsock:{}:{}", spec.cid, self.next_port);
        self.kvmmem(&["hook", "add", TARGET, &endpoint])?;
        Ok((endpoint, self.next_port))
    }

    /// The command-driven C tool for views in such a VM.
    pub(crate) fn qemu_viewer(&self, spec: &Spec) -> Result<Raw> {
        Raw::start(&self.qemu(spec)?.agent, &GuestCommand::new(VIEW).as_member())
    }

    /// The same as root.
    pub(crate) fn qemu_root_viewer(&self, spec: &Spec) -> Result<Raw> {
        Raw::start(&self.qemu(spec)?.agent, &GuestCommand::new(VIEW))
    }

    /// The command-driven C tool for v1 in such a VM.
    pub(crate) fn qemu_raw(&self, spec: &Spec) -> Result<Raw> {
        Raw::start(&self.qemu(spec)?.agent, &GuestCommand::new(RAW).as_member().memlock(1 << 20))
    }

    /// The VMs that KVM's internal errors have stopped, for a failure.
    pub(crate) fn internal_errors(&self) -> String {
        let reasons = self.qemus.iter().filter_map(|qemu| {
            let log =
                std::fs::read(self.run.path().join(format!("{}.log", qemu.spec.name))).ok()?;
            let reason = internal_error::reason(&String::from_utf8_lossy(&log))?;
            Some(format!("; QEMU stopped {}: {reason}", qemu.spec.name))
        });
        reasons.collect()
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

    /// How many views are open, as the broker knows it.
    pub(crate) fn open_views(&self) -> Result<usize> {
        Ok(self.admin()?.grants()?.iter().map(|grant| grant.views.len()).sum())
    }

    /// Whether the broker's count of open views soon falls to `wanted`.
    pub(crate) fn settles(&self, wanted: usize) -> Result<bool> {
        wait::until(|| Ok(self.open_views()? <= wanted))
    }
}
