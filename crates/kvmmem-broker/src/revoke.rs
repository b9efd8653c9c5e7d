// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Revoking a grant: its peers are notified, and their confirmations waited for.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Answer, Refusal, Revoked};

use crate::broker::{Broker, Refused};
use crate::core::Core;
use crate::core::revocation::Revocation;
use crate::peer::Peer;

/// How long confirmations are waited for.
const CONFIRM_LIMIT: Duration = Duration::from_secs(2);

impl Broker {
    /// Revokes a grant. The peers that use it are notified, and waited for at most 2 s.
    ///
    /// # Errors
    /// Where there is no such grant.
    pub(crate) fn revoke(&self, by: Credentials, grant: u64) -> Result<Answer, Refused> {
        let began = Instant::now();
        let revocation = self.core().revoke(self.now(), grant);
        let Revocation { number, target, peers, views } = revocation.ok_or_else(|| {
            Refused::new(
                Refusal::Unknown,
                format!("there is no grant {grant}; it may have ended long ago"),
            )
        })?;
        for peer in peers {
            match self.peer(peer) {
                Some(peer) => peer.revoke(grant),
                // A token may have been pushed to it just before.
                None => self.peer_lost(peer),
            }
        }
        let is_waiting = |core: &mut Core| !core.is_revoked(number);
        let waited = self.confirmed().wait_timeout_while(self.core(), CONFIRM_LIMIT, is_waiting);
        let (mut core, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let unconfirmed = core.end_revocation(number);
        drop(core);
        let revoked = Revoked {
            views: u32::try_from(views).unwrap_or(u32::MAX),
            unconfirmed: u32::try_from(unconfirmed).unwrap_or(u32::MAX),
            micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        self.audit().revoked(grant, target, &revoked, by);
        Ok(Answer::Revoked(revoked))
    }

    /// Records that a peer has released everything it held under a revoked grant.
    pub(crate) fn revoked_done(&self, peer: &Peer, grant: u64) {
        // Those that were looked up before the grant was revoked; the peer's channels are no part
        // of what it confirms.
        peer.wait_for_copies();
        let closed = self.core().confirm(self.now(), grant, peer.number());
        self.confirmed().notify_all();
        self.tell_ended(&closed, "revoked");
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
