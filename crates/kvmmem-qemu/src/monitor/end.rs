// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end of a monitor's connection when it is not used any more, and its use after that.

use std::sync::Arc;

use super::connection::{Connection, Output};
use super::users::Users;
use super::{Monitor, State, lock};
use crate::qmp::Qmp;

impl Monitor {
    /// Changes who uses the connection. It ends where no user and no loan is left; commands under
    /// way fail.
    pub(super) fn leave(&self, change: impl FnOnce(&mut Users)) {
        let mut users = lock(&self.users);
        let run = users.run();
        change(&mut users);
        if !users.need_nothing() {
            return;
        }
        let mut state = self.state();
        (state.is_stopped, state.again) = (true, None);
        let connection = state.connection.take();
        drop((state, users));
        if let Some(mut connection) = connection {
            let mut outputs = Vec::new();
            connection.fail(self.down(), &self.path, &mut outputs);
            outputs.into_iter().for_each(Output::answer);
            let socket = Arc::clone(connection.stream());
            drop(connection);
            self.close_aside(socket, run);
        }
    }

    /// Expects a new user, and takes a connection over where its own has ended.
    pub(crate) fn expect_user(&self, qmp: Option<Qmp>) {
        lock(&self.users).expect();
        // Where it is lent by this monitor, the loan ends here.
        if let Some(connection) = qmp.and_then(Connection::of) {
            self.revive(Some(connection));
        }
    }

    /// Undoes the end, with this connection or one that is to be made.
    pub(super) fn revive(&self, connection: Option<Connection>) {
        let mut state = self.state();
        if state.is_stopped {
            let former = state.file;
            *state = State::new(connection, state.counts);
            state.file = state.file.or(former);
        }
    }
}
