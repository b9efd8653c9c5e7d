// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The QMP socket of a target.

use std::path::PathBuf;

use crate::qmp::Qmp;

/// The QMP socket of a target.
#[derive(Debug)]
pub struct Socket {
    /// Where it is.
    pub path: PathBuf,
    /// The process that listened when the VM was added: the VMM, or what has handed it the socket.
    /// `None` where it is not known.
    pub listener: Option<u32>,
    /// The connection, where there is one.
    pub qmp: Option<Qmp>,
}

impl Socket {
    /// The socket of a connection, without the connection.
    pub fn of(qmp: &Qmp) -> Self {
        Self { path: qmp.path().to_owned(), listener: qmp.listener(), qmp: None }
    }
}

impl From<Qmp> for Socket {
    fn from(qmp: Qmp) -> Self {
        let socket = Self::of(&qmp);
        Self { qmp: Some(qmp), ..socket }
    }
}
