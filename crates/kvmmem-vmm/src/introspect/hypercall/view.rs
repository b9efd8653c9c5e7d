// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercalls on views: ATTACH, DETACH, SEEK.

use std::sync::Arc;
use std::task::Poll;

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{AttachRequest, AttachResult, SEEK_DATA, SEEK_HOLE};
use kvmmem_abi::native::ATTACH_READ_ONLY;
use kvmmem_client::vmm::{Caller, Token, ViewCounters};
use zeroize::Zeroizing;

use super::deferred::DeferredRequests;
use super::memory::VirtualMemory;
use crate::introspect::source::{TokenSource, ViewGrant};
use crate::introspect::window::{Progress, Seek, WindowError, Windows};
use crate::limit::warn_limited;

/// Length in bytes of the process's name in a request.
const COMM_LEN: usize = 16;

/// What names an ATTACH that waits for the broker.
#[derive(Clone, PartialEq)]
pub(super) struct AttachKey {
    token: Token,
    caller: Caller,
    read_only: bool,
    /// Where the caller wants the request and the result: those of two callers at once lie apart.
    places: (u64, u64),
    connection: u64,
}

/// Has the broker open a view; [`WindowError::Pending`] until it has answered.
pub(super) fn open(
    attached: &DeferredRequests<AttachKey, ViewGrant>,
    tokens: &Arc<dyn TokenSource>,
    mut opening: AttachKey,
) -> Result<ViewGrant, WindowError> {
    opening.connection = tokens.connection();
    let (key, connection) = (opening.clone(), opening.connection);
    let (source, releasing) = (tokens.clone(), tokens.clone());
    let work = move || source.attach(&opening.token, &opening.caller, opening.read_only);
    let release = move |attached: ViewGrant| {
        // Another connection has other views by the same numbers, and has ended this one.
        if releasing.connection() == connection {
            releasing.detached(attached.view, ViewCounters::default());
        }
    };
    match attached.fetch(key, work, release) {
        Poll::Ready(attached) => attached.map_err(WindowError::Token),
        Poll::Pending => Err(WindowError::Pending),
    }
}

/// `KVM_HC_VIEW_ATTACH`. All of the guest's addresses are checked before the token is used.
pub(super) fn attach<T: Fn(u64) -> Option<u64>>(
    windows: &Windows,
    memory: &VirtualMemory<'_, T>,
    places: (u64, u64),
    open: impl FnOnce(AttachKey) -> Result<ViewGrant, WindowError>,
) -> Poll<Result<(), KvmError>> {
    let (request_gva, result_gva) = places;
    let mut bytes = Zeroizing::new([0; AttachRequest::SIZE]);
    memory.read(request_gva, bytes.as_mut_slice())?;
    memory.check(result_gva, AttachResult::SIZE)?;
    let (token, caller, flags) = decode(&bytes).ok_or(KvmError::Inval)?;
    let read_only = flags & ATTACH_READ_ONLY != 0;
    let opening = AttachKey { token: token.clone(), caller, read_only, places, connection: 0 };
    let result = match windows.attach(&token, read_only, || open(opening)) {
        Ok(result) => result,
        Err(WindowError::Pending) => return Poll::Pending,
        Err(error) => return Poll::Ready(Err(refuse(&error))),
    };
    Poll::Ready(memory.write(result_gva, &encode(&result)).inspect_err(|_| {
        // The page tables have changed since: the guest would not learn of the view.
        let _ = windows.detach(result.descriptor_gpa);
    }))
}

/// `KVM_HC_VIEW_DETACH`.
pub(super) fn detach(windows: &Windows, descriptor_gpa: u64) -> Result<(), KvmError> {
    windows.detach(descriptor_gpa).map_err(|error| refuse(&error))
}

/// `KVM_HC_VIEW_SEEK`. A long search is made in several calls, between which the vCPU serves
/// interrupts.
pub(super) fn seek<T: Fn(u64) -> Option<u64>>(
    windows: &Windows,
    memory: &VirtualMemory<'_, T>,
    descriptor_gpa: u64,
    position_gva: u64,
    what: u64,
) -> Poll<Result<(), KvmError>> {
    let what = match what {
        SEEK_DATA => Seek::Data,
        SEEK_HOLE => Seek::Hole,
        _ => return Poll::Ready(Err(KvmError::Inval)),
    };
    let mut position = [0; 8];
    memory.read(position_gva, &mut position)?;
    let progress = match windows.seek(descriptor_gpa, u64::from_le_bytes(position), what) {
        Ok(progress) => progress,
        // How each search ends.
        Err(error @ WindowError::NotFound { .. }) => return Poll::Ready(Err(error.number())),
        Err(error) => return Poll::Ready(Err(refuse(&error))),
    };
    match progress {
        Progress::Found(gpa) => Poll::Ready(memory.write(position_gva, &gpa.to_le_bytes())),
        // The call that is executed again starts there.
        Progress::Until(gpa) => {
            memory.write(position_gva, &gpa.to_le_bytes())?;
            Poll::Pending
        }
    }
}

fn refuse(error: &WindowError) -> KvmError {
    warn_limited!(error = error as &dyn std::error::Error, "hypercall on a view refused");
    error.number()
}

/// Token, caller and flags of a request; `None` where a bit is set that has no meaning.
fn decode(bytes: &[u8; AttachRequest::SIZE]) -> Option<(Token, Caller, u32)> {
    let (token, rest) = bytes.split_first_chunk::<32>()?;
    let (pid, rest) = rest.split_first_chunk::<4>()?;
    let (uid, rest) = rest.split_first_chunk::<4>()?;
    let (comm, rest) = rest.split_first_chunk::<COMM_LEN>()?;
    let (flags, rest) = rest.split_first_chunk::<4>()?;
    let (reserved, []) = rest.split_first_chunk::<4>()? else { return None };
    let flags = u32::from_le_bytes(*flags);
    if flags & !ATTACH_READ_ONLY != 0 || *reserved != [0; 4] {
        return None;
    }
    let name = comm.split(|byte| *byte == 0).next().unwrap_or_default();
    let caller = Caller {
        pid: u32::from_le_bytes(*pid),
        uid: u32::from_le_bytes(*uid),
        comm: String::from_utf8_lossy(name).into_owned(),
    };
    Some((Token::from_bytes(token), caller, flags))
}

fn encode(result: &AttachResult) -> [u8; AttachResult::SIZE] {
    let words = [result.descriptor_gpa, result.window_gpa, result.window_len, result.reserved];
    let mut bytes = [0; AttachResult::SIZE];
    for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_decoded_or_refused() {
        let mut bytes = [0; AttachRequest::SIZE];
        bytes[..32].fill(7);
        bytes[32..36].copy_from_slice(&0x1234u32.to_le_bytes());
        bytes[36..40].copy_from_slice(&1000u32.to_le_bytes());
        bytes[40..45].copy_from_slice(b"tool\xff");
        bytes[56] = 1;
        let (token, caller, flags) = decode(&bytes).unwrap();
        assert_eq!((token.to_bytes(), flags), ([7; 32], ATTACH_READ_ONLY));
        assert_eq!(caller, Caller { pid: 0x1234, uid: 1000, comm: "tool\u{fffd}".into() });
        bytes[40..56].fill(b'x');
        assert_eq!(decode(&bytes).unwrap().1.comm, "x".repeat(16));
        for bad in [56, 57, 60, 63] {
            let mut bytes = bytes;
            bytes[bad] = 0x82;
            assert!(decode(&bytes).is_none(), "{bad}");
        }
    }
}
