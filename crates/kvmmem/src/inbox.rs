// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the VM's side has sent: messages out of a stream that comes in parts of any size.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use kvmmem_kvmi::command::EVENT;
use kvmmem_kvmi::message::{HEADER_SIZE, Header, MAX_PAYLOAD};

/// Bytes received. A tool has one question outstanding, so they are one answer, perhaps behind
/// events.
#[derive(Debug)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    /// Where the message ends that was returned last, and where the next one starts.
    start: usize,
    end: usize,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; 2 * (HEADER_SIZE + MAX_PAYLOAD)], start: 0, end: 0 }
    }

    /// Reads up to and including the next message that is not an event, within about `limit`.
    ///
    /// Nothing that a session asks for makes events, so those that come are dropped.
    pub(crate) fn answer(
        &mut self,
        stream: &mut impl Read,
        limit: Duration,
    ) -> io::Result<(Header, &[u8])> {
        let deadline = Instant::now() + limit;
        loop {
            let (header, size) = self.message(stream, deadline)?;
            let start = self.start + HEADER_SIZE;
            self.start = start + size;
            if header.id.get() != EVENT {
                let payload =
                    self.bytes.get(start..start + size).ok_or(io::ErrorKind::InvalidData)?;
                return Ok((header, payload));
            }
            tracing::debug!(size, "dropped an event");
        }
    }

    /// Reads until a whole message is there, from `start` on; returns its header and the size of
    /// its payload.
    fn message(
        &mut self,
        stream: &mut impl Read,
        deadline: Instant,
    ) -> io::Result<(Header, usize)> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            let received = self.bytes.get(..self.end).unwrap_or_default();
            if let Some(header) = Header::parse(received) {
                let size = usize::from(header.size.get());
                if size > MAX_PAYLOAD {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("a message of {size:#x} bytes"),
                    ));
                }
                if received.len() - HEADER_SIZE >= size {
                    return Ok((header, size));
                }
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let free = self.bytes.get_mut(self.end..).unwrap_or_default();
            match stream.read(free) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What a socket's own time limit looks like.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Overwrites what was received, which held a secret.
    pub(crate) fn wipe(&mut self) {
        // What was moved to the front stands behind the end as well.
        let (read, rest) = self.bytes.split_at_mut_checked(self.start).unwrap_or_default();
        zeroize::Zeroize::zeroize(read);
        let behind = rest.get_mut(self.end.saturating_sub(self.start)..).unwrap_or_default();
        zeroize::Zeroize::zeroize(behind);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Gives out its bytes in parts of the given sizes, over and over, then nothing.
    struct Parts {
        bytes: Vec<u8>,
        sizes: Vec<usize>,
        count: usize,
    }

    impl Read for Parts {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let size =
                self.sizes[self.count % self.sizes.len()].min(buf.len()).min(self.bytes.len());
            self.count += 1;
            buf[..size].copy_from_slice(&self.bytes[..size]);
            self.bytes.drain(..size);
            Ok(size)
        }
    }

    fn message(id: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
        let size = u16::try_from(payload.len()).unwrap();
        [&id.to_le_bytes()[..], &size.to_le_bytes(), &seq.to_le_bytes(), payload].concat()
    }

    proptest! {
        #[test]
        fn messages_come_out_whole_however_they_are_cut(
            messages in proptest::collection::vec(
                (0..4u16, any::<u32>(), proptest::collection::vec(any::<u8>(), 0..=MAX_PAYLOAD)), 0..6),
            sizes in proptest::collection::vec(1..9000usize, 1..8),
        ) {
            let bytes = messages.iter().flat_map(|(id, seq, payload)| message(*id, *seq, payload)).collect();
            let mut stream = Parts { bytes, sizes, count: 0 };
            let mut inbox = Inbox::new();
            for (id, seq, payload) in messages.iter().filter(|(id, ..)| *id != EVENT) {
                let (header, found) = inbox.answer(&mut stream, Duration::from_secs(60)).unwrap();
                prop_assert_eq!((header.id.get(), header.seq.get()), (*id, *seq));
                prop_assert_eq!(found, payload);
            }
            let end = inbox.answer(&mut stream, Duration::from_secs(60)).unwrap_err();
            prop_assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_payload_above_the_limit_is_refused_at_its_header() {
        let mut bytes = message(2, 1, &[]);
        bytes[2..4].copy_from_slice(&u16::try_from(MAX_PAYLOAD + 1).unwrap().to_le_bytes());
        let error = Inbox::new().answer(&mut &bytes[..], Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn bytes_that_trickle_in_do_not_hold_the_tool_for_ever() {
        struct Trickle;
        impl Read for Trickle {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                std::thread::sleep(Duration::from_millis(1));
                buf[0] = 2;
                Ok(1)
            }
        }
        let error = Inbox::new().answer(&mut Trickle, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn what_was_read_can_be_wiped() {
        // The answer is moved in front of where it came.
        let bytes = [message(EVENT, 0, &[0xee; 8]), message(22, 1, &[0xaa; 40])].concat();
        let mut inbox = Inbox::new();
        inbox.answer(&mut &bytes[..], Duration::from_secs(60)).unwrap();
        inbox.wipe();
        assert!(inbox.bytes.iter().all(|byte| *byte == 0));
    }
}
