// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's end of a connection: what it pushes, and to whom.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use kvmmem_kvmi::token::Token;
use rustix::io::Errno;

use crate::grants::LIFETIME;
use crate::packet::{PacketError, PacketSocket, Wait};
use crate::registry::Vm;
use crate::scope::Scope;
use crate::wire::FromBroker;

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

/// A connected peer.
#[derive(Debug)]
pub struct Peer {
    socket: PacketSocket,
    credentials: Credentials,
    /// The targets that were introduced. Held while pushing, so that the order of pushes is that of the changes.
    known: Mutex<HashSet<u64>>,
}

impl Peer {
    /// The peer at the other end of a socket.
    pub fn new(socket: PacketSocket, credentials: Credentials) -> Self {
        Self { socket, credentials, known: Mutex::default() }
    }

    /// The connection.
    pub fn socket(&self) -> &PacketSocket {
        &self.socket
    }

    /// Who it is.
    pub fn credentials(&self) -> Credentials {
        self.credentials
    }

    /// Makes sure that the peer has been told of a target.
    ///
    /// # Errors
    /// Where the peer does not read, or the target is gone.
    pub fn introduce(&self, target: &Vm) -> Result<(), PacketError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.introduce_once(&mut known, target)
    }

    /// Pushes a token for a target.
    ///
    /// # Errors
    /// Where the peer does not read, or the target is gone.
    pub fn grant(&self, target: &Vm, token: &Token, grant: u64, scope: Scope) -> Result<(), PacketError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.introduce_once(&mut known, target)?;
        let granted = FromBroker::Granted {
            token: token.clone(),
            grant,
            scope,
            target: target.id(),
            expires_in_ms: u64::try_from(LIFETIME.as_millis()).unwrap_or(0),
        };
        self.socket.send(&granted, None, Wait::No)
    }

    /// Tells the peer that a target is gone, if it knows it. A peer that does not read loses its connection, for it
    /// would keep what it must not.
    pub fn gone(&self, target: u64) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.remove(&target) && self.socket.send(&FromBroker::Gone { target }, None, Wait::No).is_err() {
            self.socket.shut_down();
        }
    }

    fn introduce_once(&self, known: &mut HashSet<u64>, target: &Vm) -> Result<(), PacketError> {
        // Whoever removes a VM marks it first and then takes this lock: no introduction follows the news of its end.
        let ram = target.ram().filter(|_| !target.is_gone()).ok_or(PacketError::Send(Errno::NODEV))?;
        if known.contains(&target.id()) {
            return Ok(());
        }
        let registration = target.registration();
        let introduction = FromBroker::Target {
            id: target.id(),
            name: registration.name.clone(),
            uuid: registration.uuid,
            generation: 1,
            regions: ram.map().regions().to_vec(),
        };
        self.socket.send(&introduction, Some(ram.fd()), Wait::No)?;
        known.insert(target.id());
        Ok(())
    }
}
