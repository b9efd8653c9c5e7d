// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A monitor's connection, lent to a conversation whose commands wait for their answers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::connection::Command;
use super::{Monitor, shut_down};
use crate::qmp::{LIMIT, QmpError, Shared};

/// How long a command may wait for those before it.
const QUEUE_LIMIT: Duration = Duration::from_secs(20);

/// One connection of a monitor's, lent.
#[derive(Debug)]
pub(super) struct Loan {
    pub(super) monitor: Arc<Monitor>,
    pub(super) stream: Arc<OwnedFd>,
    /// How many connections were lost before this one.
    pub(super) losses: u64,
}

impl Shared for Loan {
    fn execute(
        &self,
        command: &'static str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        end: Option<Instant>,
    ) -> Result<Value, QmpError> {
        let path = self.monitor.path();
        let failed = |source| QmpError::Connection { path: path.to_owned(), source };
        let fd = fd.map(|fd| fd.try_clone_to_owned()).transpose().map_err(failed)?;
        let (reply, answer) = mpsc::channel();
        let reply = move |result| {
            // Who has given up waiting needs no answer.
            let _ = reply.send(result);
        };
        let command = Command::new(command, arguments, fd, Box::new(reply));
        self.monitor.put(command, Some(self.losses));
        let end = end.unwrap_or_else(|| Instant::now() + QUEUE_LIMIT);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match answer.recv_timeout(left.min(LIMIT)) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => return Err(self.monitor.down()),
                // Who steps may not know that the command is due.
                Err(RecvTimeoutError::Timeout) if left > LIMIT => drop(self.monitor.step()),
                Err(RecvTimeoutError::Timeout) => {
                    self.monitor.step();
                    return answer
                        .try_recv()
                        .unwrap_or_else(|_| Err(QmpError::Silent(path.to_owned())));
                }
            }
        }
    }

    fn fail(&self) {
        shut_down(&self.stream);
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
