// SPDX-License-Identifier: Apache-2.0 OR MIT
//! KVMI sessions: a connection to one virtual machine, on which the tool sends commands.
//!
//! Tools get one from [`crate::Listener::accept`]. Each method is one command of the protocol
//! (crate `kvmmem-kvmi`). After an error of the connection the session is over.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::ioctl::PAGE_SIZE;
use kvmmem_kvmi::handshake::{HandshakeError, ToolHello, VmHello};
use kvmmem_kvmi::message::{HEADER_SIZE, MAX_PAYLOAD};
use kvmmem_kvmi::reply::{
    self, DecodeError, Fixed, GuestInfo, MapToken, MaxGfn, Outcome, PhysicalSlot, Version,
};
use kvmmem_kvmi::request::Request;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::timed::TimedSocket;

use crate::explain;
use crate::inbox::Inbox;
pub use crate::operation::Operation;
use crate::stream::Stream;

/// Time limit of the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Time limit of a reply.
const REPLY_LIMIT: Duration = Duration::from_secs(15);

/// Why a session could not be started, or a command failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The handshake failed.
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    /// The peer speaks an older protocol.
    #[error("the peer speaks KVMI version {found:#x}; at least 0x1 is needed")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The peer answered with an error; the session can still be used.
    #[error("{operation}: {}", explain::kvmi(*error))]
    Refused {
        /// What was asked for.
        operation: Operation,
        /// The answer.
        error: KvmError,
    },
    /// The range passes the end of the address space.
    #[error("{len:#x} bytes from gpa {gpa:#x} on pass the end of the address space")]
    Range {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
    },
    /// The socket failed or was closed, or no answer came in time; the session is over.
    #[error("{operation}: the connection failed")]
    Connection {
        /// What was asked for.
        operation: Operation,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The answer does not match the request; the session is over.
    #[error("{operation}: the answer (id {id:#x}, seq {seq:#x}, {size:#x} bytes) does not fit")]
    Answer {
        /// What was asked for.
        operation: Operation,
        /// The answer's command number.
        id: u16,
        /// The answer's sequence number.
        seq: u32,
        /// The size of the answer's payload or data in bytes.
        size: usize,
    },
    /// The answer cannot be decoded; the session is over.
    #[error("{operation}: the answer cannot be decoded")]
    Decode {
        /// What was asked for.
        operation: Operation,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
    /// An earlier error ended the session.
    #[error("{operation}: an earlier error ended this session; wait for a new connection")]
    Over {
        /// What was asked for.
        operation: Operation,
    },
}

/// A connection to one virtual machine, after the handshake.
#[derive(Debug)]
pub struct Session {
    stream: Stream,
    hello: VmHello,
    version: Version,
    next_seq: u32,
    is_over: bool,
    outbox: Vec<u8>,
    inbox: Inbox,
}

impl Session {
    /// Does the tool's side of the handshake and checks the version.
    pub(crate) fn start(stream: Stream) -> Result<Self, SessionError> {
        let deadline = Instant::now() + HANDSHAKE_LIMIT;
        let mut timed = TimedSocket::new(stream.as_fd(), deadline);
        let hello = VmHello::receive(&mut timed)?;
        ToolHello::default().send(&mut timed)?;
        stream.set_timeouts(REPLY_LIMIT).map_err(HandshakeError::from)?;
        let mut session = Self {
            stream,
            hello,
            version: Version::OURS,
            next_seq: 1,
            is_over: false,
            outbox: Vec::with_capacity(HEADER_SIZE + MAX_PAYLOAD),
            inbox: Inbox::new(),
        };
        session.version = session.fixed(Operation::GetVersion, &Request::GetVersion)?;
        match session.version.version.get() {
            0 => Err(SessionError::Version { found: 0 }),
            _ => Ok(session),
        }
    }

    /// The VM's name, as the handshake reported it. It may hold any characters: escape it before
    /// printing.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// println!("{:?}", target.name());
    /// # Ok(())
    /// # }
    /// ```
    pub fn name(&self) -> &str {
        &self.hello.name
    }

    /// The VM's UUID, in the order in which it is printed.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// println!("{:02x?}", target.uuid());
    /// # Ok(())
    /// # }
    /// ```
    pub fn uuid(&self) -> [u8; 16] {
        self.hello.uuid
    }

    /// When the VM was started, milliseconds since the epoch.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// println!("started {} s after the epoch", target.start_time_ms() / 1000);
    /// # Ok(())
    /// # }
    /// ```
    pub fn start_time_ms(&self) -> i64 {
        self.hello.start_time_ms
    }

    /// The protocol's version and the host's optional features.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// println!("KVMI version {:#x}", target.version().version);
    /// # Ok(())
    /// # }
    /// ```
    pub fn version(&self) -> Version {
        self.version
    }

    /// GET_GUEST_INFO: the number of vCPUs.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// println!("{} vCPUs", target.guest_info()?.vcpu_count);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn guest_info(&mut self) -> Result<GuestInfo, SessionError> {
        self.fixed(Operation::GetGuestInfo, &Request::GetGuestInfo)
    }

    /// GET_MAX_GFN: the frame number after the last one that is backed by memory.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// println!("memory ends at {:#x}", target.max_gfn()? << 12);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn max_gfn(&mut self) -> Result<u64, SessionError> {
        let reply: MaxGfn = self.fixed(Operation::GetMaxGfn, &Request::GetMaxGfn)?;
        Ok(reply.gfn.get())
    }

    /// QUERY_PHYSICAL: the range of memory around frame `gfn` that is contiguous in the target and
    /// in its backing.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// let slot = target.query_physical(0x100)?;
    /// println!("{slot:x?}");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`SessionError`]; [`KvmError::Inval`] if the target has no memory there.
    pub fn query_physical(&mut self, gfn: u64) -> Result<PhysicalSlot, SessionError> {
        self.fixed(Operation::QueryPhysical { gfn }, &Request::QueryPhysical { gfn })
    }

    /// GET_MAP_TOKEN: a token for one [`crate::View`] or one [`crate::Device::map`], valid for
    /// about 3 seconds.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), Box<dyn std::error::Error>> {
    /// use kvmmem::{Access, View};
    ///
    /// let view = View::attach(&target.map_token()?, Access::ReadOnly)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`SessionError`]; [`KvmError::Again`] if too many tokens are outstanding, or the host is
    /// still plugging in the view by which a guest of a stock QEMU maps pages: ask again.
    pub fn map_token(&mut self) -> Result<Token, SessionError> {
        let reply: MapToken = self.fixed(Operation::GetMapToken, &Request::GetMapToken)?;
        self.inbox.wipe();
        Ok(reply.token())
    }

    /// Reads guest-physical memory at `gpa` into `buf`, with one READ_PHYSICAL for each page.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// let mut bytes = [0; 64];
    /// target.read_physical(0x10_0000, &mut bytes)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`SessionError`]; [`KvmError::Inval`] if the target has no memory there. The bytes before
    /// that page are filled.
    pub fn read_physical(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), SessionError> {
        check_range(gpa, buf.len())?;
        let (mut gpa, mut rest) = (gpa, buf);
        while !rest.is_empty() {
            let (part, after) = rest.split_at_mut(part_len(gpa, rest.len()));
            let operation = Operation::Read { gpa, len: part.len() };
            let size = u16::try_from(part.len()).unwrap_or(u16::MAX);
            let data = self.call(operation, &Request::ReadPhysical { gpa, size })?;
            let Some(data) = data.get(..part.len()) else {
                let (id, size) = (kvmmem_kvmi::command::READ_PHYSICAL, data.len());
                self.is_over = true;
                return Err(SessionError::Answer {
                    operation,
                    id,
                    seq: self.next_seq.wrapping_sub(1),
                    size,
                });
            };
            part.copy_from_slice(data);
            gpa = gpa.wrapping_add(part.len() as u64);
            rest = after;
        }
        Ok(())
    }

    /// Writes `bytes` to guest-physical memory at `gpa`, with one WRITE_PHYSICAL for each page.
    ///
    /// ```no_run
    /// # fn example(target: &mut kvmmem::Session) -> Result<(), kvmmem::SessionError> {
    /// target.write_physical(0x10_0000, b"patched")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`SessionError`]; [`KvmError::Inval`] if the target has no memory there. The bytes before
    /// that page are written.
    pub fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), SessionError> {
        check_range(gpa, bytes.len())?;
        let (mut gpa, mut rest) = (gpa, bytes);
        while !rest.is_empty() {
            let (part, after) = rest.split_at(part_len(gpa, rest.len()));
            let operation = Operation::Write { gpa, len: part.len() };
            self.call(operation, &Request::WritePhysical { gpa, data: part })?;
            gpa = gpa.wrapping_add(part.len() as u64);
            rest = after;
        }
        Ok(())
    }

    fn fixed<T: Fixed>(
        &mut self,
        operation: Operation,
        request: &Request<'_>,
    ) -> Result<T, SessionError> {
        self.call(operation, request).map(T::decode)
    }

    /// Sends a request and returns the data of its answer.
    fn call(&mut self, operation: Operation, request: &Request<'_>) -> Result<&[u8], SessionError> {
        if self.is_over {
            return Err(SessionError::Over { operation });
        }
        let seq = self.next_seq;
        self.next_seq = self.next_seq.wrapping_add(1);
        self.outbox.clear();
        // Fails for arguments that break the command's rules; nothing is sent then.
        request
            .encode(seq, &mut self.outbox)
            .map_err(|error| SessionError::Refused { operation, error })?;

        // The stream is at the start of a message again once a whole, matching answer was read.
        self.is_over = true;
        let failed = |source| SessionError::Connection { operation, source };
        self.stream.write_all(&self.outbox).map_err(failed)?;
        let (header, payload) = self.inbox.answer(&mut self.stream, REPLY_LIMIT).map_err(failed)?;
        let (id, answered) = (header.id.get(), header.seq.get());
        if (id, answered) != (request.id(), seq) {
            return Err(SessionError::Answer { operation, id, seq: answered, size: payload.len() });
        }
        let outcome =
            reply::decode(payload).map_err(|source| SessionError::Decode { operation, source })?;
        self.is_over = false;
        match outcome {
            Outcome::Done(data) => Ok(data),
            Outcome::Failed(error) => Err(SessionError::Refused { operation, error }),
        }
    }
}

/// Bytes up to the end of the page, at most `len`: what one command may move.
fn part_len(gpa: u64, len: usize) -> usize {
    usize::try_from(PAGE_SIZE - gpa % PAGE_SIZE).map_or(len, |left| left.min(len))
}

fn check_range(gpa: u64, len: usize) -> Result<(), SessionError> {
    // The last byte may be the address space's last one.
    let last = (len as u64).checked_sub(1).map_or(Some(gpa), |more| gpa.checked_add(more));
    last.map(|_| ()).ok_or(SessionError::Range { gpa, len })
}
