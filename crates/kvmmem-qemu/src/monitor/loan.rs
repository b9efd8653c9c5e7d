// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A monitor's connection, lent to a conversation whose commands wait for their answers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Monitor;
use super::connection::{Command, shut_down};
use crate::qmp::{LIMIT, Qmp, QmpError, SharedConnection};

/// How long a command may wait for those before it.
const QUEUE_LIMIT: Duration = Duration::from_secs(20);

/// One connection of a monitor's, lent.
#[derive(Debug)]
struct Loan {
    monitor: Arc<Monitor>,
    stream: Arc<OwnedFd>,
    /// How many connections were lost before this one.
    losses: u64,
}

impl SharedConnection for Loan {
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

impl Monitor {
    /// The connection as it is now, for commands whose answers are waited for; they fail once it is
    /// lost.
    ///
    /// # Errors
    /// [`QmpError::Down`] where there is none.
    pub fn lend(self: &Arc<Self>) -> Result<Qmp, QmpError> {
        let state = self.state();
        let connection = state.connection.as_ref().ok_or_else(|| self.down())?;
        let (stream, losses) = (Arc::clone(connection.stream()), state.counts.losses);
        let loan = Loan { monitor: Arc::clone(self), stream, losses };
        Ok(Qmp::over(self.path.clone(), Box::new(loan)))
    }
}
