// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread of a [`Monitor`]: takes events, and connects again to the same QEMU when the
//! connection is lost.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kvmmem_qemu::qmp::{Qmp, QmpError};
use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

use super::{Board, LIMIT, Monitor, share};

/// How long to wait before QEMU is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long other threads have the connection between two turns of a QEMU that sends more events
/// than one turn takes.
const FLOOD_PAUSE: Duration = Duration::from_millis(5);

/// What a QEMU says of itself, and says again over a later connection.
const IDENTITY: [&str; 2] = ["query-name", "query-uuid"];

impl Monitor {
    /// Takes events and connects again until the monitor is stopped.
    pub(super) fn run(&self) {
        let (mut pause, most) = BACK_OFF;
        loop {
            let socket = self.board().socket.clone();
            match socket {
                Some(socket) => {
                    pause = BACK_OFF.0;
                    self.wait_readable(&socket);
                    // Commands take events, too.
                    self.wait_while(LIMIT, |board| board.commands > 0);
                    let more = self.take_events(&mut self.slot());
                    if more {
                        self.wait_while(FLOOD_PAUSE, |_| true);
                    }
                }
                None => {
                    self.wait_while(pause, |_| true);
                    pause = (pause * 2).min(most);
                    self.connect_again();
                }
            }
            if self.board().stopped {
                *self.slot() = None;
                return;
            }
        }
    }

    /// Waits for some time, or until it is not so, or the monitor is stopped.
    fn wait_while(&self, timeout: Duration, is_so: impl Fn(&Board) -> bool) {
        let is_going = |board: &mut Board| !board.stopped && is_so(board);
        let waited = self.changed.wait_timeout_while(self.board(), timeout, is_going);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn wait_readable(&self, socket: &OwnedFd) {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
        // Interrupted or not, events are looked for next.
        if let Err(error) = rustix::event::poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            std::thread::sleep(LIMIT);
        }
    }

    fn connect_again(&self) {
        if self.board().stopped {
            return;
        }
        match self.find() {
            Ok(Some((qmp, socket))) => {
                let mut slot = self.slot();
                let mut board = self.board();
                if board.stopped {
                    return;
                }
                *slot = Some(qmp);
                board.socket = Some(socket);
                board.news.returns += 1;
                board.is_down = false;
                drop(board);
                self.changed.notify_all();
                tracing::info!(path = %self.path.display(), "QEMU answers again");
            }
            // Another QEMU; the one that was there has ended, or ends now.
            Ok(None) => {}
            Err(error) => self.warn(&error),
        }
    }

    /// A new connection to the same QEMU.
    fn find(&self) -> Result<Option<(Qmp, Arc<OwnedFd>)>, QmpError> {
        let mut qmp = Qmp::connect(&self.path)?;
        let is_same = qmp.listener() == self.listener && identity(&mut qmp)? == self.identity;
        let socket = share(&qmp)
            .map_err(|source| QmpError::Connection { path: self.path.clone(), source })?;
        Ok(is_same.then_some((qmp, socket)))
    }
}

/// Which QEMU it is, by its own answer: the wrapper that made its socket may have made others for
/// other QEMUs.
pub(in super::super) fn identity(qmp: &mut Qmp) -> Result<Vec<Value>, QmpError> {
    IDENTITY.iter().map(|command| qmp.execute(command, json!({}))).collect()
}
