// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connection from a host process to the broker, which sends it the memfds of the target's RAM.
//!
//! [`crate::View`] uses it on the host. The process is trusted: it gets whole memfds, of which the
//! scope names a part, and a mapping cannot be removed from outside. Revocation is cooperative: the
//! broker notifies the process, which unmaps and confirms ([`HostLink::confirm`]). To enforce it,
//! end the process.
//!
//! If the RAM is private to its VMM there is no memfd. The broker then copies what the process
//! reads and writes ([`Copier`]) and enforces the scope.

mod channel;
mod copier;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::client;
pub use kvmmem_proto::client::ClientError;
use kvmmem_proto::map::{MemoryMap, Region};
use kvmmem_proto::message::{
    Answer, Call, Caller, FromBroker, Refusal, Request, Unusable, ViewCounters,
};
use kvmmem_proto::packet::{PacketBuffer, PacketError, PacketSocket, Wait};
use kvmmem_proto::scope::{MAX_SPANS, Rights, Scope, Span};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use uuid::Uuid;

use channel::Channel;
use copier::{CHANNELS, ViewEnd};
pub use copier::{Copier, CopyError, PartialCopy};

/// Connection from a host process to the broker. The view closes when this is dropped.
#[derive(Debug)]
pub struct HostLink {
    socket: PacketSocket,
    buffer: PacketBuffer,
    ended: Arc<ViewEnd>,
    view: u64,
    grant: u64,
    target: u64,
    scope: Scope,
    end: End,
}

/// Whether the view has ended, and whether the broker waits for a confirmation of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    No,
    Revoked,
    Confirmed,
    Gone,
}

/// What a process may read, as attached.
#[derive(Debug)]
pub struct HostView {
    /// The broker's number for the view.
    pub view: u64,
    /// UUID of the target.
    pub uuid: Uuid,
    /// Name of the target.
    pub name: String,
    /// Grows with each change of the target's RAM.
    pub generation: u64,
    /// Whether memory may be written.
    pub rights: Rights,
    /// The RAM that the grant reaches, by ascending address.
    pub regions: Vec<Region>,
    /// The target's memfds, by [`Region::file`]: read-only if the view is, sealed against
    /// shrinking. Empty if there is a [`HostView::copier`].
    pub files: Vec<OwnedFd>,
    /// Copies memory that cannot be mapped; the offsets of [`HostView::regions`] have no meaning
    /// then.
    pub copier: Option<Copier>,
}

/// What has happened to a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// The target was reset, or its RAM has moved: earlier mappings are stale.
    Changed {
        /// Higher than before.
        generation: u64,
        /// The RAM that the grant reaches now.
        regions: Vec<Region>,
    },
    /// The grant was revoked. The broker waits for [`HostLink::confirm`].
    Revoked,
    /// The target or the broker has exited.
    Gone,
}

impl HostLink {
    /// Attaches a view with a token, by the broker that listens at `socket`.
    ///
    /// ```no_run
    /// use kvmmem::host::HostLink;
    /// use kvmmem::view;
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let (link, host_view) = HostLink::attach(&view::default_socket(), &token, true)?;
    /// println!("{}: {} regions", host_view.name, host_view.regions.len());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ClientError`] if the broker cannot be reached or refuses the token. Where this process has
    /// no file descriptors left for the target's RAM, the broker returns the token its use; `kvmmem
    /// proxy` cannot.
    pub fn attach(
        socket: &Path,
        token: &Token,
        read_only: bool,
    ) -> Result<(Self, HostView), ClientError> {
        Self::attach_reaching(socket, token, read_only, &[])
    }

    /// As [`HostLink::attach`]. The broker refuses, and does not use the token, if the view has no
    /// memory at one of the first [`MAX_SPANS`] of `reaching`. An older broker ignores `reaching`.
    ///
    /// ```no_run
    /// use kvmmem::host::HostLink;
    /// use kvmmem::view;
    /// use kvmmem_proto::scope::Span;
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let wanted = [Span { gpa: 0x10_0000, len: 0x1000 }];
    /// let socket = view::default_socket();
    /// let (link, host_view) = HostLink::attach_reaching(&socket, &token, true, &wanted)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`HostLink::attach`], and [`Refusal::Invalid`] with the span and where there is memory.
    pub fn attach_reaching(
        socket: &Path,
        token: &Token,
        read_only: bool,
        reaching: &[Span],
    ) -> Result<(Self, HostView), ClientError> {
        let socket = client::connect(socket)?;
        // The broker takes only the name from this; it has process and user from the socket.
        let caller = Caller::this_process();
        let reaching = reaching.iter().take(MAX_SPANS).copied().collect();
        let call = Call::Attach { token: token.clone(), caller, read_only, reaching };
        let mut buffer = PacketBuffer::default();
        // Pushes about the target and the grant that arrive before the answer.
        let mut early = Vec::new();
        let request = Request { id: 1, call };
        let (answer, files) =
            client::ask(&socket, &mut buffer, &request, &[], |push| early.push(push))?;
        let Answer::HostAttached {
            view,
            grant,
            target,
            scope,
            uuid,
            name,
            generation,
            regions,
            copied,
        } = answer
        else {
            return Err(ClientError::NoAnswer);
        };
        let map = MemoryMap::new(regions).map_err(ClientError::Map)?;
        let undo = || undo_attach(&socket, target, view);
        let files = files.ok_or(PacketError::NoDescriptors).inspect_err(|_| undo())?;
        let (found, needed) = (files.len(), map.file_count());
        if found < needed && !copied {
            return Err(ClientError::Files { found, needed });
        }
        let (rights, regions) = (scope.rights, scope.regions(&map));
        let ended = Arc::<ViewEnd>::default();
        let copier = if copied {
            let channels = open_channels(&socket, &mut buffer, view, &mut early);
            let channels = channels.inspect_err(|_| undo())?;
            Some(Copier::new(channels, Arc::clone(&ended)))
        } else {
            None
        };
        let mut link = Self { socket, buffer, ended, view, grant, target, scope, end: End::No };
        let mut host_view =
            HostView { view, uuid, name, generation, rights, regions, files, copier };
        for push in early {
            match link.event(push)? {
                Some(HostEvent::Changed { generation, regions })
                    if generation > host_view.generation =>
                {
                    (host_view.generation, host_view.regions) = (generation, regions);
                }
                Some(HostEvent::Revoked | HostEvent::Gone) => return Err(ClientError::Ended),
                Some(HostEvent::Changed { .. }) | None => {}
            }
        }
        Ok((link, host_view))
    }

    /// Waits at most `timeout` for the next event; `None` if there is no event in time.
    ///
    /// ```no_run
    /// # use kvmmem::host::{ClientError, HostEvent, HostLink};
    /// # fn example(link: &mut HostLink) -> Result<(), ClientError> {
    /// if let Some(HostEvent::Revoked) = link.wait(std::time::Duration::from_secs(1))? {
    ///     // Unmap everything first.
    ///     link.confirm();
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ClientError::Ended`] after [`HostEvent::Revoked`] and [`HostEvent::Gone`].
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<HostEvent>, ClientError> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if self.end != End::No {
                return Err(ClientError::Ended);
            }
            if !self.is_readable(deadline)? {
                return Ok(None);
            }
            let message = match self.socket.receive(&mut self.buffer) {
                Ok(Some((message, _))) => message,
                Err(PacketError::Receive(Errno::AGAIN)) => continue,
                // The grant could not be revoked any more, so the view ends on any failure.
                Ok(None) | Err(_) => {
                    self.ended(End::Gone);
                    return Ok(Some(HostEvent::Gone));
                }
            };
            if let Some(event) = self.event(message)? {
                return Ok(Some(event));
            }
        }
    }

    /// The event that a push causes for this view.
    fn event(&mut self, message: FromBroker) -> Result<Option<HostEvent>, ClientError> {
        match message {
            FromBroker::Revoke { grant } if grant == self.grant => {
                self.ended(End::Revoked);
                Ok(Some(HostEvent::Revoked))
            }
            FromBroker::Gone { target } if target == self.target => {
                self.ended(End::Gone);
                Ok(Some(HostEvent::Gone))
            }
            FromBroker::Changed { target, generation, regions } if target == self.target => {
                let map = MemoryMap::new(regions).map_err(ClientError::Map)?;
                Ok(Some(HostEvent::Changed { generation, regions: self.scope.regions(&map) }))
            }
            _ => Ok(None),
        }
    }

    /// Records the end. Threads that wait for a copy return at once, since the caller may wait for
    /// them next.
    fn ended(&mut self, end: End) {
        self.end = end;
        let end = if end == End::Revoked { copier::End::Revoked } else { copier::End::Gone };
        self.ended.set(end);
    }

    /// Confirms, after [`HostEvent::Revoked`], that this process has unmapped the target's memory.
    ///
    /// ```no_run
    /// # fn example(link: &mut kvmmem::host::HostLink) {
    /// // After `HostEvent::Revoked`, when nothing is mapped any more.
    /// link.confirm();
    /// # }
    /// ```
    pub fn confirm(&mut self) {
        if self.end == End::Revoked {
            self.end = End::Confirmed;
            self.tell(Call::RevokedDone { grant: self.grant });
        }
    }

    fn tell(&self, call: Call) {
        // A broker that does not get this sees the end of the connection.
        let _ = self.socket.send(&Request { id: 0, call }, &[], Wait::No);
    }

    fn is_readable(&self, deadline: Option<Instant>) -> Result<bool, ClientError> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // A timeout that is too long for the kernel never ends.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match rustix::event::poll(
                &mut [PollFd::new(&self.socket, PollFlags::IN)],
                left.as_ref(),
            ) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(PacketError::Receive(error).into()),
            }
        }
    }
}

/// Has the broker close a view that cannot be used for want of descriptors; its token gets the use
/// back.
fn undo_attach(socket: &PacketSocket, target: u64, view: u64) {
    let unusable = Unusable::View(view);
    let call = Call::Unreceived { target, introduction: 0, unusable };
    // A broker that does not take it closes the view with the connection.
    let _ = socket.send(&Request { id: 0, call }, &[], Wait::Limited);
}

/// Opens channels for the copies of a view, at least one. `early` gets what the broker pushes
/// meanwhile.
fn open_channels(
    socket: &PacketSocket,
    buffer: &mut PacketBuffer,
    view: u64,
    early: &mut Vec<FromBroker>,
) -> Result<Vec<Channel>, ClientError> {
    let mut channels = Vec::new();
    while channels.len() < CHANNELS {
        // The attach was request 1.
        let id = 2 + channels.len() as u64;
        let request = Request { id, call: Call::OpenCopies { view } };
        match open_channel(socket, buffer, &request, early) {
            Ok(channel) => channels.push(channel),
            // One is enough.
            Err(
                ClientError::Refused { refusal: Refusal::Limit, .. }
                | ClientError::Packet(PacketError::NoDescriptors)
                | ClientError::Local { .. },
            ) if !channels.is_empty() => break,
            Err(error) => return Err(error),
        }
    }
    Ok(channels)
}

fn open_channel(
    socket: &PacketSocket,
    buffer: &mut PacketBuffer,
    request: &Request,
    early: &mut Vec<FromBroker>,
) -> Result<Channel, ClientError> {
    let no_channel = |error: Errno| ClientError::Local {
        what: "make a channel for copies",
        source: error.into(),
    };
    let (bytes, file) = Channel::buffer().map_err(no_channel)?;
    let push = |push| early.push(push);
    let (_, files) = client::ask(socket, buffer, request, &[file.as_fd()], push)?;
    let file = files.ok_or(PacketError::NoDescriptors)?.pop().ok_or(ClientError::NoAnswer)?;
    Channel::new(file, bytes).map_err(no_channel)
}

impl AsFd for HostLink {
    /// Becomes readable when [`HostLink::wait`] has an event.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for HostLink {
    fn drop(&mut self) {
        self.ended.set(copier::End::Gone);
        match self.end {
            End::No => {
                self.tell(Call::Detached { view: self.view, counters: ViewCounters::default() })
            }
            End::Revoked => self.confirm(),
            End::Confirmed | End::Gone => {}
        }
    }
}
