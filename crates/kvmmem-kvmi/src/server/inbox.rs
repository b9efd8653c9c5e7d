// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages that a tool has sent.

use std::io::{self, Read};

use super::error::ServeError;
use crate::message::{HEADER_SIZE, Header, MAX_PAYLOAD};

/// Bytes that have come and are not yet served. Has room for one message of the largest size, so
/// that a usual request takes one read, and a batch of small ones as well.
pub(super) struct Inbox {
    bytes: Box<[u8; HEADER_SIZE + MAX_PAYLOAD]>,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self { bytes: Box::new([0; HEADER_SIZE + MAX_PAYLOAD]), start: 0, end: 0 }
    }
}

impl Inbox {
    /// Replaces the content with these bytes, which fit.
    pub(super) fn load(&mut self, bytes: &[u8]) {
        self.start = 0;
        self.end = 0;
        for (to, from) in self.bytes.iter_mut().zip(bytes) {
            *to = *from;
            self.end += 1;
        }
    }

    pub(super) fn waiting(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Drops at most `count` bytes; returns how many.
    pub(super) fn skip(&mut self, count: usize) -> usize {
        let count = count.min(self.end - self.start);
        self.start += count;
        count
    }

    /// The next message, where all of it has come.
    pub(super) fn next(&mut self) -> Result<Option<(Header, &[u8])>, ServeError> {
        let Some(header) = Header::parse(self.waiting()) else { return Ok(None) };
        let size = header.size.get();
        if usize::from(size) > MAX_PAYLOAD {
            return Err(ServeError::TooLong { id: header.id.get(), size });
        }
        let payload = self.start + HEADER_SIZE;
        let end = payload + usize::from(size);
        if end > self.end {
            return Ok(None);
        }
        self.start = end;
        Ok(Some((header, self.bytes.get(payload..end).unwrap_or_default())))
    }

    /// Appends the bytes that have arrived; 0 at the end of the stream.
    pub(super) fn fill(&mut self, stream: &mut impl Read) -> io::Result<usize> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            match stream.read(self.bytes.get_mut(self.end..).unwrap_or_default()) {
                Ok(count) => {
                    self.end += count;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
