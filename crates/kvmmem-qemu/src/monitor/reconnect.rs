// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lost connections of a monitor, and new ones.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_limit::RateLimit;

use super::connection::{Connection, Output};
use super::{AGAIN, Find, Monitor, Run, SOON, State, lock};
use crate::qmp::QmpError;

/// A QEMU can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// How long the others who have a lost connection may take to drop it.
const DROP_LIMIT: Duration = Duration::from_secs(10);

impl Monitor {
    /// Gives the connection up; returns its socket, for [`Self::close_aside`].
    pub(super) fn lose(
        &self,
        state: &mut State,
        error: QmpError,
        outputs: &mut Vec<Output>,
    ) -> Option<Arc<OwnedFd>> {
        let mut connection = state.connection.take()?;
        self.warn(&error);
        connection.fail(error, &self.path, outputs);
        state.counts.losses += 1;
        state.again = Some(Instant::now() + AGAIN);
        state.pause = AGAIN * 2;
        outputs.push(Output::Lost);
        Some(Arc::clone(connection.stream()))
    }

    /// Has a job close a connection: what was not received may have files whose close blocks, and
    /// who steps must not wait for that.
    pub(super) fn close_aside(&self, socket: Arc<OwnedFd>, run: Option<Arc<Run>>) {
        let closing = Arc::clone(&self.closing);
        let close = move || {
            // Those who wait for the socket drop it once they hear that it is lost.
            let limit = Instant::now() + DROP_LIMIT;
            while Arc::strong_count(&socket) > 1 && Instant::now() < limit {
                std::thread::sleep(SOON);
            }
            drop(socket);
            drop(closing);
        };
        // Without a user, or a thread for it, it is closed here.
        let _ = run.map(|run| run(Box::new(close)));
    }

    pub(super) fn connect_again(self: &Arc<Self>) {
        let users = lock(&self.users);
        let finds: Vec<Arc<Find>> = users.all().iter().map(|user| Arc::clone(&user.find)).collect();
        let run = users.run();
        drop(users);
        let me = Arc::downgrade(self);
        let attempt = move || {
            let found = finds.iter().find_map(|find| find()).and_then(Connection::of);
            if let Some(monitor) = me.upgrade() {
                monitor.found(found);
            }
        };
        if run.is_none_or(|run| run(Box::new(attempt)).is_err()) {
            self.found(None);
        }
    }

    fn found(&self, connection: Option<Connection>) {
        let again_at_last = lock(&self.users).all().iter().map(|user| user.again_at_last).min();
        let mut state = self.state();
        if state.is_stopped || state.connection.is_some() {
            return;
        }
        let Some(connection) = connection else {
            let pause = state.pause.min(again_at_last.unwrap_or(AGAIN));
            state.again = Some(Instant::now() + pause);
            state.pause = pause * 2;
            return;
        };
        state.file = connection.file;
        (state.connection, state.pause) = (Some(connection), AGAIN);
        drop(state);
        tracing::info!(path = %self.path.display(), "QEMU answers");
        let _passing = lock(&self.passing);
        self.pass(vec![Output::Found]);
    }

    fn warn(&self, error: &QmpError) {
        if let Some(suppressed) = WARNINGS.allow(Instant::now()) {
            let error: &dyn std::error::Error = error;
            tracing::warn!(
                path = %self.path.display(), suppressed, error,
                "a QMP connection is lost; it is made anew where possible"
            );
        }
    }
}
