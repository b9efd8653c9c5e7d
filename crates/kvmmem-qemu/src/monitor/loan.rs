// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A monitor's connection, lent to a conversation whose commands wait for their answers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::Value;
use serde_json::value::RawValue;

use super::connection::{Command, shut_down};
use super::users::Users;
use super::{Monitor, lock};
use crate::qmp::line::MAX_RECEIVED;
use crate::qmp::{LIMIT, Qmp, QmpError, SharedConnection};

/// How long a command may wait for those before it.
const QUEUE_LIMIT: Duration = Duration::from_secs(20);

/// How long a command waits before it looks whether it has to step.
const TURN: Duration = Duration::from_millis(20);

/// One connection of a monitor's, lent. It does not end before the loan, unless it is lost.
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
    ) -> Result<Box<RawValue>, QmpError> {
        let path = self.monitor.path();
        let failed = |source| QmpError::Connection { path: path.to_owned(), source };
        let fd = fd.map(|fd| fd.try_clone_to_owned()).transpose().map_err(failed)?;
        let (reply, answer) = mpsc::channel();
        let reply = move |result| {
            // Who has given up waiting needs no answer.
            let _ = reply.send(result);
        };
        let command = Command::new(command, arguments, fd, MAX_RECEIVED, Box::new(reply));
        self.monitor.put(command, Some(self.losses));
        let end = end.unwrap_or_else(|| Instant::now() + QUEUE_LIMIT);
        let due = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match answer.recv_timeout(left.min(TURN)) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => return Err(self.monitor.down()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Who steps may not know that the command is due, or be gone.
            let is_over = left <= TURN;
            if is_over || Instant::now() >= due || self.monitor.is_left() {
                self.monitor.step();
            }
            if is_over {
                return answer
                    .try_recv()
                    .unwrap_or_else(|_| Err(QmpError::Silent(path.to_owned())));
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

impl Drop for Loan {
    fn drop(&mut self) {
        self.monitor.leave(Users::end_loan);
    }
}

impl Monitor {
    /// The connection as it is now, for commands whose answers are waited for; they fail once it is
    /// lost. The monitor keeps it until it is returned, also without users.
    ///
    /// # Errors
    /// [`QmpError::Down`] where there is none.
    pub fn lend(self: &Arc<Self>) -> Result<Qmp, QmpError> {
        let mut users = lock(&self.users);
        let state = self.state();
        let connection = state.connection.as_ref().ok_or_else(|| self.down())?;
        let (stream, losses) = (Arc::clone(connection.stream()), state.counts.losses);
        users.lend();
        let loan = Loan { monitor: Arc::clone(self), stream, losses };
        Ok(Qmp::over(self.path.clone(), Box::new(loan)))
    }

    fn is_left(&self) -> bool {
        lock(&self.users).are_gone()
    }
}
