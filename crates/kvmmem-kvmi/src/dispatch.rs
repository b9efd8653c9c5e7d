// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the server answers to each message, apart from any socket.
//!
//! The rules are those of the v6 kernel, with two exceptions. A bad request gets an error reply
//! where that kernel would close the connection. And nothing is sent while the tool has switched
//! the replies off: that kernel answers a command that it does not offer even then, but a tool in a
//! batch waits for the reply to the batch's last message alone (libkvmi) and is out of step for
//! good once another one comes first. The first refusal of the batch is the error of the message
//! that switches the replies on again instead, so that the tool does not take silence for success.
//! (libkvmi always has that message answered; where it is not, the refusal is lost.)
//!
//! Only these break the stream: a payload larger than the protocol allows, and an offered command
//! that returns data while the replies are off, for then the two sides no longer agree on what
//! follows.

use kvmmem_abi::errno::KvmError;
use zerocopy::IntoBytes;
use zeroize::Zeroize;

use crate::command::{self, Level};
use crate::message::{ErrorCode, HEADER_SIZE, Header, VcpuHeader};
use crate::reply::{self, GuestInfo, MaxGfn, PREFIX_SIZE, PhysicalSlot, Version};
use crate::request::{MAX_TRANSFER, Request};
use crate::token::Token;

/// The VM that is introspected, as the server needs it.
pub trait TargetVm {
    /// Name of the VM.
    fn name(&self) -> &str;

    /// UUID, in the order in which it is printed.
    fn uuid(&self) -> [u8; 16];

    /// When the VM was started, milliseconds since the epoch.
    fn start_time_ms(&self) -> i64;

    /// Number of vCPUs.
    fn vcpu_count(&self) -> u32;

    /// The guest frame number after the last one that is backed by memory.
    fn max_gfn(&self) -> u64;

    /// The range of backed memory that holds a frame.
    ///
    /// # Errors
    /// [`KvmError::Inval`] where the frame is not backed.
    fn slot(&self, gfn: u64) -> Result<PhysicalSlot, KvmError>;

    /// Copies guest-physical memory from `gpa` on into `buffer`, which never crosses a page.
    ///
    /// # Errors
    /// [`KvmError::Inval`] where the page is not backed: the v6 kernel's answer (its documentation
    /// has ENOENT).
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<(), KvmError>;

    /// Copies `data`, which never crosses a page, to guest-physical memory from `gpa` on.
    ///
    /// # Errors
    /// [`KvmError::Inval`] where the page is not backed.
    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), KvmError>;

    /// Makes a token that allows one mapping of this VM's memory.
    ///
    /// # Errors
    /// [`KvmError::Again`] where too many are outstanding.
    fn mint_token(&self) -> Result<Token, KvmError>;
}

/// Why the connection has to be closed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("command {id} returns data, but the tool has switched the replies off")]
pub struct RepliesOff {
    /// The command.
    pub id: u16,
}

/// Where replies are put together: a reply's data is written where it is sent from.
pub struct ReplyBuffer {
    bytes: Box<[u8; CAPACITY]>,
}

/// Room for the longest reply, a page of memory.
const CAPACITY: usize = PREFIX_SIZE + MAX_TRANSFER as usize;

impl Default for ReplyBuffer {
    fn default() -> Self {
        Self { bytes: Box::new([0; CAPACITY]) }
    }
}

impl ReplyBuffer {
    fn data(&mut self, size: u16) -> &mut [u8] {
        self.bytes.get_mut(PREFIX_SIZE..PREFIX_SIZE + usize::from(size)).unwrap_or_default()
    }

    /// Copies `data` to where a reply's data goes; returns its size.
    fn put(&mut self, data: &[u8]) -> u16 {
        let mut size = 0;
        for (to, from) in self.bytes.iter_mut().skip(PREFIX_SIZE).zip(data) {
            *to = *from;
            size += 1;
        }
        size
    }

    /// Wipes the data of a reply that held a token.
    pub fn wipe(&mut self) {
        self.bytes.zeroize();
    }
}

/// The state of one connection.
#[derive(Debug)]
pub struct Dispatcher {
    replies: bool,
    /// The first refusal of a command that is not offered since the replies were switched off.
    refused: Option<KvmError>,
}

impl Default for Dispatcher {
    fn default() -> Self {
        Self { replies: true, refused: None }
    }
}

impl Dispatcher {
    /// Carries out the message of this header and payload; returns the reply to send, if any.
    ///
    /// # Errors
    /// [`RepliesOff`]: the connection is to be closed.
    pub fn answer<'b>(
        &mut self,
        vm: &impl TargetVm,
        header: Header,
        payload: &[u8],
        buffer: &'b mut ReplyBuffer,
    ) -> Result<Option<&'b [u8]>, RepliesOff> {
        let id = header.id.get();
        // Answers an event, and gets no answer itself. No event is sent that it could answer.
        if id == command::EVENT_REPLY {
            return Ok(None);
        }
        if !command::is_offered(id) {
            let error = refusal(id, payload, vm.vcpu_count());
            if !self.replies {
                self.refused.get_or_insert(error);
                return Ok(None);
            }
            return Ok(seal(buffer, header, Err(error), 0));
        }
        let request = Request::decode(id, payload);
        let mut replies = self.replies;
        if let Ok(Request::ControlCmdResponse { enable, now }) = request {
            self.replies = enable;
            if now {
                replies = enable;
            }
            if enable && let Some(error) = self.refused.take() {
                return Ok(if replies { seal(buffer, header, Err(error), 0) } else { None });
            }
        }
        if !replies && request.as_ref().is_ok_and(returns_data) {
            return Err(RepliesOff { id });
        }
        let outcome = request.and_then(|request| carry_out(vm, request, buffer));
        if !replies {
            return Ok(None);
        }
        let size = *outcome.as_ref().unwrap_or(&0);
        Ok(seal(buffer, header, outcome.map(|_| ()), size))
    }
}

/// Why a command that is not offered is refused.
fn refusal(id: u16, payload: &[u8], vcpu_count: u32) -> KvmError {
    match command::level(id) {
        Level::Vcpu => VcpuHeader::check(payload, vcpu_count).err().unwrap_or(KvmError::OpNotSupp),
        Level::Vm | Level::Unknown => KvmError::OpNotSupp,
    }
}

/// Whether a success of this command comes with data.
fn returns_data(request: &Request<'_>) -> bool {
    match request {
        Request::GetVersion
        | Request::GetGuestInfo
        | Request::ReadPhysical { .. }
        | Request::GetMapToken
        | Request::GetMaxGfn
        | Request::QueryPhysical { .. } => true,
        Request::CheckCommand(_)
        | Request::CheckEvent(_)
        | Request::WritePhysical { .. }
        | Request::ControlCmdResponse { .. } => false,
    }
}

/// Carries out a command; returns the size of the data that it left in `buffer`.
fn carry_out(
    vm: &impl TargetVm,
    request: Request<'_>,
    buffer: &mut ReplyBuffer,
) -> Result<u16, KvmError> {
    match request {
        Request::GetVersion => Ok(buffer.put(Version::OURS.as_bytes())),
        Request::CheckCommand(id) if command::is_offered(id) => Ok(0),
        // No event is offered: each needs a vCPU, or the end of the VM, which also closes the
        // connection.
        Request::CheckCommand(_) | Request::CheckEvent(_) => Err(KvmError::Perm),
        Request::GetGuestInfo => Ok(buffer.put(GuestInfo::new(vm.vcpu_count()).as_bytes())),
        Request::ReadPhysical { gpa, size } => vm.read(gpa, buffer.data(size)).map(|()| size),
        Request::WritePhysical { gpa, data } => vm.write(gpa, data).map(|()| 0),
        Request::GetMapToken => {
            let bytes = zeroize::Zeroizing::new(vm.mint_token()?.to_bytes());
            Ok(buffer.put(&*bytes))
        }
        Request::ControlCmdResponse { .. } => Ok(0),
        Request::GetMaxGfn => Ok(buffer.put(MaxGfn { gfn: vm.max_gfn().into() }.as_bytes())),
        Request::QueryPhysical { gfn } => vm.slot(gfn).map(|slot| buffer.put(slot.as_bytes())),
    }
}

/// Puts header and error code before `size` bytes of data.
fn seal(
    buffer: &mut ReplyBuffer,
    request: Header,
    outcome: Result<(), KvmError>,
    size: u16,
) -> Option<&[u8]> {
    let prefix = reply::prefix(request.id.get(), request.seq.get(), outcome, usize::from(size))?;
    *buffer.bytes.first_chunk_mut::<PREFIX_SIZE>()? = prefix;
    buffer.bytes.get(..PREFIX_SIZE + usize::from(size))
}

const _: () = assert!(PREFIX_SIZE == HEADER_SIZE + size_of::<ErrorCode>());
