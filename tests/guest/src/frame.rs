// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames: one byte of kind, the payload's length as a little-endian u32, the payload.

use std::io::{self, Read, Write};

/// Longest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

const HEADER: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A [`crate::request::Request`] as JSON: the first frame of a connection.
    Request,
    /// A [`crate::request::Reply`] as JSON.
    Reply,
    /// Bytes for the process's stdin; an empty one closes it.
    Stdin,
    /// Bytes the process wrote to its stdout.
    Stdout,
    /// Bytes the process wrote to its stderr.
    Stderr,
    /// A [`crate::request::ExitStatus`] as JSON: the last frame of a process.
    Exit,
    /// A signal number for the process, as a little-endian i32.
    Signal,
    /// Bytes of a file.
    Data,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Request,
        Self::Reply,
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Exit,
        Self::Signal,
        Self::Data,
    ];

    fn code(self) -> u8 {
        match self {
            Self::Request => b'Q',
            Self::Reply => b'R',
            Self::Stdin => b'I',
            Self::Stdout => b'O',
            Self::Stderr => b'E',
            Self::Exit => b'X',
            Self::Signal => b'K',
            Self::Data => b'D',
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// Its bytes, at most [`MAX_PAYLOAD`].
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The kind is not a [`Kind`].
    #[error("unknown frame kind {0:#x}")]
    Kind(u8),
    /// The length exceeds [`MAX_PAYLOAD`].
    #[error("frame of {0:#x} bytes is too long")]
    Length(u32),
}

/// Takes frames out of a stream of bytes that arrives in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` while it is incomplete.
    ///
    /// # Errors
    /// When the bytes are not frames; the stream is then of no further use.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(&[code, a, b, c, d]) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let kind = Kind::from_code(code).ok_or(FrameError::Kind(code))?;
        let length = u32::from_le_bytes([a, b, c, d]);
        let end = match usize::try_from(length) {
            Ok(length) if length <= MAX_PAYLOAD => HEADER + length,
            _ => return Err(FrameError::Length(length)),
        };
        if self.buffer.len() < end {
            return Ok(None);
        }
        let payload = self.buffer.drain(..end).skip(HEADER).collect();
        Ok(Some(Frame { kind, payload }))
    }

    /// Whether a frame has begun but not ended.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        !self.buffer.is_empty()
    }
}

/// Writes `bytes` as frames of `kind`: several for many bytes, one empty frame for no bytes.
///
/// # Errors
/// As the stream's.
pub fn write(stream: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    loop {
        let (piece, after) = rest.split_at(rest.len().min(MAX_PAYLOAD));
        let length = u32::try_from(piece.len()).map_err(io::Error::other)?;
        let mut frame = Vec::with_capacity(HEADER + piece.len());
        frame.push(kind.code());
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(piece);
        stream.write_all(&frame)?;
        rest = after;
        if rest.is_empty() {
            return stream.flush();
        }
    }
}

/// Reads from `stream` until `decoder` has a frame; `None` at the end of the stream.
///
/// # Errors
/// As the stream's; `InvalidData` when it does not carry frames, `UnexpectedEof` when it ends
/// inside one.
pub fn read(stream: &mut impl Read, decoder: &mut Decoder) -> io::Result<Option<Frame>> {
    let mut bytes = vec![0; 16 * 1024];
    loop {
        if let Some(frame) = decoder
            .next_frame()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?
        {
            return Ok(Some(frame));
        }
        match stream.read(&mut bytes) {
            Ok(0) if decoder.is_partial() => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => return Ok(None),
            Ok(length) => decoder.push(bytes.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let kind = (0..Kind::ALL.len()).prop_map(|index| Kind::ALL[index]);
        let frame = (kind, proptest::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(kind, payload)| Frame { kind, payload });
        proptest::collection::vec(frame, 0..8)
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(frames in frames(), piece in 1_usize..64) {
            let mut bytes = Vec::new();
            for frame in &frames {
                write(&mut bytes, frame.kind, &frame.payload).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(piece) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(!decoder.is_partial());
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let mut decoder = Decoder::default();
            let mut stream = bytes.as_slice();
            while let Ok(Some(frame)) = read(&mut stream, &mut decoder) {
                prop_assert!(frame.payload.len() <= MAX_PAYLOAD);
            }
        }
    }

    #[test]
    fn long_bytes_become_several_frames() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::Data, &vec![7; MAX_PAYLOAD * 2 + 1]).unwrap();
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        let lengths: Vec<_> = std::iter::from_fn(|| decoder.next_frame().unwrap())
            .map(|frame| frame.payload.len())
            .collect();
        assert_eq!(lengths, [MAX_PAYLOAD, MAX_PAYLOAD, 1]);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_at_once() {
        let mut decoder = Decoder::default();
        decoder.push(&[b'D', 1, 0, 1, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::Length(0x1_0001)));
    }
}
