// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Adds VMs again that were added to a broker before.

use std::io;
use std::path::Path;
use std::sync::Arc;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{IntrospectorRequest, Which};
use kvmmem_qemu::attach;
use kvmmem_qemu::process::Process;

use super::State;
use super::entry::{Entry, Role};
use crate::core::call_error::{CallError, in_words};
use crate::service::Service;

/// Why a VM is not added again.
#[derive(Debug, thiserror::Error)]
enum RestoreError {
    #[error("its VMM has ended")]
    Ended,
    #[error("its RAM is in other files now")]
    OtherFiles,
    #[error("{0}")]
    Refused(String),
}

impl From<CallError> for RestoreError {
    fn from(refused: CallError) -> Self {
        Self::Refused(refused.message)
    }
}

impl Service {
    /// Remembers in a folder, which is made, what VMs are added; and adds those again that are
    /// remembered there and still run, on a thread of its own: QEMUs take their time to answer.
    ///
    /// # Errors
    /// Where nothing can be written there, or there is no thread left.
    pub fn remember_in(self: &Arc<Self>, directory: &Path) -> io::Result<()> {
        let entries = self.broker().state().open(directory)?;
        if entries.is_empty() {
            return Ok(());
        }
        let service = Arc::clone(self);
        let restore = move || entries.iter().for_each(|entry| service.restore(entry));
        std::thread::Builder::new().name("restore".into()).spawn(restore).map(|_| ())
    }

    fn restore(self: &Arc<Self>, entry: &Entry) {
        let state: &State = self.broker().state();
        // An operator was faster, or the broker ends.
        if !state.is_waiting(entry) {
            return;
        }
        let (name, pid) = (&entry.name, entry.pid);
        match self.add_again(entry) {
            Ok(()) => tracing::info!(name, pid, "added again"),
            Err(RestoreError::Refused(error)) => {
                tracing::warn!(
                    name,
                    pid,
                    error,
                    "cannot be added again; the next start tries once more"
                );
            }
            Err(error @ (RestoreError::Ended | RestoreError::OtherFiles)) => {
                state.give_up(entry);
                tracing::info!(name, pid, reason = in_words(&error), "not added again");
            }
        }
    }

    fn add_again(self: &Arc<Self>, entry: &Entry) -> Result<(), RestoreError> {
        let process = Process::open(entry.pid).map_err(|_| RestoreError::Ended)?;
        if process.started() != Some(entry.started) {
            return Err(RestoreError::Ended);
        }
        let which = match entry.qmp.clone() {
            Some(socket) => Which::Qmp { socket, pid: Some(entry.pid) },
            None => Which::Pid(entry.pid),
        };
        let broker =
            Credentials { pid: std::process::id(), uid: rustix::process::geteuid().as_raw() };
        let name = Some(entry.name.clone());
        match &entry.role {
            Role::Target { files } => {
                let opened = attach::open(&which, name, &|path| self.monitors().connect(path));
                let mut opened = opened.map_err(|error| RestoreError::Refused(in_words(&error)))?;
                opened.identity.uuid = entry.uuid;
                if opened.source.file_ids() != *files {
                    return Err(RestoreError::OtherFiles);
                }
                // What was asked and opened until now is that process's.
                if !process.is_alive() {
                    return Err(RestoreError::Ended);
                }
                self.add_opened(broker, opened)?;
            }
            Role::Introspector { cid, on_silence, trusted } => {
                if !process.is_alive() {
                    return Err(RestoreError::Ended);
                }
                let (cid, on_silence, trusted) = (Some(*cid), *on_silence, *trusted);
                let request = IntrospectorRequest { which, cid, name, on_silence, trusted };
                self.introspect(broker, &request, Some(entry.uuid))?;
                // It was opened by its number once more. If this one has not ended, the two are
                // one.
                if !process.is_alive() {
                    self.remove_introspector(&entry.name)?;
                    return Err(RestoreError::Ended);
                }
            }
        }
        Ok(())
    }
}
