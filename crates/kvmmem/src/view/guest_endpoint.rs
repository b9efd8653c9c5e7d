// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest endpoint, the tool's side: attaches views in a virtual machine under a stock QEMU.
//!
//! The tool connects to the broker by vsock before it attaches by the device, or maps the PCI
//! devices by itself. The connection stands
//! for the view: the host unplugs the view's devices when it closes. The frames are those of
//! [`kvmmem_proto::guest`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::guest::{self, FrameError};
use kvmmem_proto::guest::{FromTool, GUEST_PORT, MappedBy, ToTool};
use kvmmem_proto::message::{Caller, Refusal};
use kvmmem_proto::timed::TimedSocket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vsock::{VMADDR_CID_HOST, VsockStream};

/// Environment variable with another vsock port of the host's guest endpoint.
pub const GUEST_PORT_VARIABLE: &str = "KVMMEM_GUEST_PORT";

/// How long the host may take to plug devices into this machine and see its driver take them.
const LIMIT: Duration = Duration::from_secs(15);

/// Why the host's guest endpoint opened no view.
#[derive(Debug, thiserror::Error)]
pub enum GuestEndpointError {
    /// The environment names no port.
    #[error("{GUEST_PORT_VARIABLE} is not a vsock port: {0:?}")]
    Port(String),
    /// The host cannot be reached.
    #[error("cannot connect to the host at vsock port {port}{}", remedy(source))]
    Connect {
        /// The port.
        port: u32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The host's answer is missing or invalid.
    #[error(
        "the host at vsock port {port} gave no answer; its log says more (journalctl -u kvmmemd)"
    )]
    Answer {
        /// The port.
        port: u32,
        /// What is wrong with the answer; `None` if the host closed the connection without one.
        #[source]
        source: Option<FrameError>,
    },
    /// The host refused.
    #[error("{message}")]
    Refused {
        /// Kind of failure; [`Refusal::Unknown`] for a token that is unknown, used, expired or for
        /// another holder.
        refusal: Refusal,
        /// The host's words.
        message: String,
    },
    /// The host opened the view, but the driver does not have it.
    #[error(
        "the host opened the view, but this machine's driver does not have it any more: was the grant revoked at once? The \
         kernel's log may say more (dmesg | grep kvmmem)"
    )]
    Lost,
}

/// What to do if the host cannot be reached.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NODEV | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
            ": this machine has no vsock device; its QEMU needs -device vhost-vsock-pci,guest-cid=N (libvirt: <vsock \
             model='virtio'>), and its kernel vmw_vsock_virtio_transport"
        }
        Some(Errno::CONNREFUSED | Errno::CONNRESET) => {
            ": no process listens there; is kvmmemd running, and was this machine added (kvmmem introspector add)?"
        }
        Some(Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH) => {
            ": the host does not answer; does it have vhost_vsock, and this machine a context id of its own?"
        }
        Some(Errno::ACCESS | Errno::PERM) => ": this machine's security policy forbids vsock",
        _ => "",
    }
}

/// A view's connection to the host. The view ends with it.
#[derive(Debug)]
pub(super) struct GuestConnection {
    stream: OwnedFd,
    ticket: Token,
}

impl GuestConnection {
    /// Asks the host to open the view that `token` allows, for `caller`; this uses the token. The
    /// devices are plugged in when this returns.
    pub(super) fn open(
        token: &Token,
        read_only: bool,
        mapped_by: MappedBy,
        caller: Caller,
    ) -> Result<Self, GuestEndpointError> {
        let port = port()?;
        let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port);
        let stream = stream.map_err(|source| GuestEndpointError::Connect { port, source })?;
        let ticket = ask(stream.as_fd(), port, token, read_only, mapped_by, caller)?;
        Ok(Self { stream: stream.into(), ticket })
    }

    /// A connection over which a view was opened.
    #[cfg(test)]
    pub(super) fn of(stream: OwnedFd, ticket: Token) -> Self {
        Self { stream, ticket }
    }

    /// The token by which the device takes the view that was opened.
    pub(super) fn ticket(&self) -> &Token {
        &self.ticket
    }

    /// Ends the connection, also for children that were forked.
    pub(super) fn shut(&self) {
        // It fails only where the host has ended it.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    /// Whether the host has ended the connection, and with it the view.
    pub(super) fn is_shut(&self) -> bool {
        is_shut(self.stream.as_fd())
    }
}

impl AsFd for GuestConnection {
    /// Becomes readable when the host ends the connection; it sends nothing else.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Whether the host's guest endpoint accepts this virtual machine. No token is used: an unknown
/// virtual machine is refused at once, and `patience` is how long to wait for a refusal.
///
/// ```no_run
/// # use kvmmem::view::{GuestEndpointError, check_guest_endpoint};
/// check_guest_endpoint(std::time::Duration::from_secs(1))?;
/// println!("this virtual machine may attach views");
/// # Ok::<(), GuestEndpointError>(())
/// ```
///
/// # Errors
/// [`GuestEndpointError`], with what to do about it.
pub fn check_guest_endpoint(patience: Duration) -> Result<(), GuestEndpointError> {
    let port = port()?;
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port);
    let stream = stream.map_err(|source| GuestEndpointError::Connect { port, source })?;
    wait_for_refusal(stream.as_fd(), port, patience)
}

/// Succeeds if no refusal arrives in time.
fn wait_for_refusal(
    socket: BorrowedFd<'_>,
    port: u32,
    patience: Duration,
) -> Result<(), GuestEndpointError> {
    match guest::read(&mut TimedSocket::new(socket, Instant::now() + patience)) {
        Err(FrameError::Read(error)) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
        Err(source) => Err(GuestEndpointError::Answer { port, source: Some(source) }),
        Ok(Some(ToTool::Refused { refusal, message })) => {
            Err(GuestEndpointError::Refused { refusal, message })
        }
        Ok(Some(ToTool::Opened { .. }) | None) => {
            Err(GuestEndpointError::Answer { port, source: None })
        }
    }
}

/// The port of the host's guest endpoint.
fn port() -> Result<u32, GuestEndpointError> {
    match std::env::var_os(GUEST_PORT_VARIABLE) {
        None => Ok(GUEST_PORT),
        Some(text) => {
            let text = text.to_string_lossy();
            text.parse().map_err(|_| GuestEndpointError::Port(text.into_owned()))
        }
    }
}

/// Asks for a view and waits for the answer, the view's ticket.
fn ask(
    socket: BorrowedFd<'_>,
    port: u32,
    token: &Token,
    read_only: bool,
    mapped_by: MappedBy,
    caller: Caller,
) -> Result<Token, GuestEndpointError> {
    let mut timed = TimedSocket::new(socket, Instant::now() + LIMIT);
    let question = FromTool::Open { token: token.clone(), read_only, caller, mapped_by };
    // Who is refused at once may be so before this is sent; the answer tells.
    let sent = guest::write(&mut timed, &question);
    let no_answer = |source| GuestEndpointError::Answer { port, source };
    match guest::read(&mut timed).map_err(|error| no_answer(Some(error)))? {
        Some(ToTool::Opened { ticket, .. }) => Ok(ticket),
        Some(ToTool::Refused { refusal, message }) => {
            Err(GuestEndpointError::Refused { refusal, message })
        }
        None => Err(no_answer(sent.err())),
    }
}

fn is_shut(socket: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut files = [PollFd::from_borrowed_fd(socket, PollFlags::IN | PollFlags::RDHUP)];
    matches!(poll(&mut files, Some(&now)), Ok(ready) if ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use super::*;

    fn token() -> Token {
        Token::new([1, 2, 3, 4])
    }

    /// The host's end, which reads the question and does what it is told.
    fn host(
        act: impl FnOnce(&mut UnixStream, Option<FromTool>) + Send + 'static,
    ) -> (UnixStream, JoinHandle<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let question = guest::read(&mut theirs).unwrap();
            act(&mut theirs, question);
        });
        (ours, thread)
    }

    #[test]
    fn a_view_is_open_until_the_host_shuts() {
        let (ours, thread) = host(|stream, question| {
            let Some(FromTool::Open { token: asked, read_only, caller, .. }) = question else {
                panic!()
            };
            assert!(asked == token() && read_only && caller.pid == std::process::id());
            guest::write(stream, &ToTool::Opened { view: 3, ticket: Token::new([9; 4]) }).unwrap();
            assert_eq!(guest::read::<FromTool>(stream).unwrap(), None);
        });
        assert_eq!(
            ask(ours.as_fd(), 1, &token(), true, MappedBy::Module, Caller::this_process()).unwrap(),
            Token::new([9; 4])
        );
        assert!(!is_shut(ours.as_fd()));
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        thread.join().unwrap();
        assert!(is_shut(ours.as_fd()));
    }

    #[test]
    fn the_hosts_words_are_passed_on() {
        let (ours, thread) = host(|stream, _| {
            guest::write(
                stream,
                &ToTool::refused(Refusal::Denied, "no free place: add a root port"),
            )
            .unwrap();
        });
        let error = ask(ours.as_fd(), 1, &token(), false, MappedBy::Module, Caller::this_process())
            .unwrap_err();
        assert!(
            matches!(error, GuestEndpointError::Refused { refusal: Refusal::Denied, .. }),
            "{error:?}"
        );
        assert_eq!(error.to_string(), "no free place: add a root port");
        thread.join().unwrap();
    }

    #[test]
    fn no_answer_and_a_wrong_one_are_errors() {
        for bytes in [&b""[..], b"\x02\0\0\0{}", b"\xff\xff\xff\xff", b"\x16\0\0\0{"] {
            let (ours, thread) = host(|stream, _| stream.write_all(bytes).unwrap());
            let error =
                ask(ours.as_fd(), 27510, &token(), true, MappedBy::Module, Caller::this_process())
                    .unwrap_err();
            assert!(matches!(error, GuestEndpointError::Answer { .. }), "{error:?}");
            assert!(error.to_string().contains("27510"), "{error}");
            thread.join().unwrap();
        }
        // One that has closed before the question.
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = ask(ours.as_fd(), 1, &token(), true, MappedBy::Module, Caller::this_process())
            .unwrap_err();
        assert!(matches!(error, GuestEndpointError::Answer { .. }), "{error:?}");
    }

    #[test]
    fn a_tool_that_connects_gets_a_refusal_or_nothing() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        wait_for_refusal(ours.as_fd(), 1, Duration::from_millis(20)).unwrap();
        guest::write(&mut theirs, &ToTool::refused(Refusal::Denied, "not an introspector"))
            .unwrap();
        drop(theirs);
        let patience = Duration::from_secs(20);
        assert_eq!(
            wait_for_refusal(ours.as_fd(), 1, patience).unwrap_err().to_string(),
            "not an introspector"
        );
        assert!(matches!(
            wait_for_refusal(ours.as_fd(), 1, patience),
            Err(GuestEndpointError::Answer { source: None, .. })
        ));
    }

    #[test]
    fn each_way_to_fail_has_its_remedy() {
        for (errno, words) in [
            (Errno::NODEV, "vhost-vsock-pci"),
            (Errno::CONNRESET, "introspector add"),
            (Errno::TIMEDOUT, "vhost_vsock"),
        ] {
            let error = GuestEndpointError::Connect { port: 5, source: errno.into() };
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
