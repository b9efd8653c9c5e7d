// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Taking grants back: whoever uses one is told, and waited for.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, Refusal, Revoked};

use crate::broker::{Broker, Refused};
use crate::peer::Peer;

/// How long confirmations are waited for.
const CONFIRM_LIMIT: Duration = Duration::from_secs(2);

/// The confirmations that are waited for.
#[derive(Debug, Default)]
pub(crate) struct Confirmations {
    state: Mutex<State>,
    /// Signalled when one has come, or will never come.
    came: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Waiting>,
    last: u64,
}

/// What one request waits for.
#[derive(Debug)]
struct Waiting {
    number: u64,
    grant: u64,
    peers: BTreeSet<u64>,
    /// Connections that have ended without a confirmation.
    lost: usize,
}

impl Confirmations {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to wait for `peers`; returns the number of the wait.
    fn begin(&self, grant: u64, peers: BTreeSet<u64>) -> u64 {
        let mut state = self.lock();
        state.last += 1;
        let number = state.last;
        state.waiting.push(Waiting { number, grant, peers, lost: 0 });
        number
    }

    /// Waits until all have confirmed or ended, or time is up; returns how many have not confirmed.
    fn wait(&self, number: u64) -> usize {
        let is_open = |state: &mut State| {
            state
                .waiting
                .iter()
                .any(|waiting| waiting.number == number && !waiting.peers.is_empty())
        };
        let waited = self.came.wait_timeout_while(self.lock(), CONFIRM_LIMIT, is_open);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let found = state.waiting.iter().position(|waiting| waiting.number == number);
        let waiting = found.map(|index| state.waiting.swap_remove(index));
        waiting.map_or(0, |waiting| waiting.peers.len() + waiting.lost)
    }

    /// Takes note that a connection no longer uses a grant.
    pub(crate) fn confirm(&self, grant: u64, peer: u64) {
        for waiting in self.lock().waiting.iter_mut().filter(|waiting| waiting.grant == grant) {
            waiting.peers.remove(&peer);
        }
        self.came.notify_all();
    }

    /// Takes note that a connection has ended.
    pub(crate) fn forget_peer(&self, peer: u64) {
        for waiting in &mut self.lock().waiting {
            if waiting.peers.remove(&peer) {
                waiting.lost += 1;
            }
        }
        self.came.notify_all();
    }
}

impl Broker {
    /// Takes a grant back. Everybody who uses it is told, and waited for at most 2 s.
    ///
    /// # Errors
    /// Where there is no such grant.
    pub(crate) fn revoke(&self, by: Credentials, grant: u64) -> Result<Answer, Refused> {
        let began = Instant::now();
        let affected = self.grants().revoke(self.now(), grant);
        let affected = affected.ok_or_else(|| {
            Refused::new(
                Refusal::Unknown,
                format!("there is no grant {grant}; it may have ended long ago"),
            )
        })?;
        let wait = self.confirmations().begin(grant, affected.peers.clone());
        // What was closed before the wait began has told nobody.
        let using = self.grants().peers_of(grant);
        for number in affected.peers {
            // One that leaves is taken off the list of connections first, and off the waits then.
            match self.peer(number) {
                _ if !using.contains(&number) => self.confirmations().confirm(grant, number),
                Some(peer) => peer.revoke(grant),
                None => self.confirmations().forget_peer(number),
            }
        }
        let unconfirmed = self.confirmations().wait(wait);
        let revoked = Revoked {
            views: u32::try_from(affected.views).unwrap_or(u32::MAX),
            unconfirmed: u32::try_from(unconfirmed).unwrap_or(u32::MAX),
            micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        self.audit().revoked(grant, affected.target, &revoked, by);
        Ok(Answer::Revoked(revoked))
    }

    /// Takes note that a connection no longer uses a grant that was taken back.
    pub(crate) fn revoked_done(&self, peer: &Peer, grant: u64) {
        // Those that were looked up before the grant was revoked; the peer's channels are no part
        // of what it confirms.
        peer.wait_for_copies();
        let ended = self.grants().confirm(self.now(), grant, peer.number());
        self.confirmations().confirm(grant, peer.number());
        self.tell_ended(&ended, "revoked");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use kvmmem_proto::packet::PacketSocket;

    use super::*;

    #[test]
    fn a_revocation_is_confirmed_after_the_copies_that_were_allowed_before() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = PacketSocket::accepted(socket.into(), Duration::from_secs(1)).unwrap();
        let peer = Arc::new(Peer::new(socket, Credentials { pid: 1, uid: 0 }));
        let broker = Broker::default();
        let copying = peer.copying();
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                broker.revoked_done(&peer, 1);
                done.send(()).unwrap();
            });
            let early = is_done.recv_timeout(Duration::from_millis(50));
            drop(copying);
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
            is_done.recv_timeout(Duration::from_secs(60)).unwrap();
        });
    }
}
