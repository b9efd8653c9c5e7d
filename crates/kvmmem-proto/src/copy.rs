// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What travels on a copy channel: a request names pieces of a target's memory, the answer says how
//! far they were copied.
//!
//! The channel is a unix SOCK_SEQPACKET socket that the broker makes for a view
//! ([`crate::message::Call::OpenCopies`]), and a memfd of the tool's that both map. Packets are
//! little-endian words, answers come in the order of the requests:
//!
//! ```text
//! request   id u32 | flags u32 | at u32 | 0 u32 | { gpa u64 | len u32 | 0 u32 } ...
//! answer    id u32 | status u32 | pieces u32 | bytes u32
//! ```
//!
//! The pieces lie one after the other in the memfd, from `at` on. Both peers reject every other
//! packet.

/// The most bytes that one request copies. A memfd holds [`SLOTS`] of them, so that one can be
/// emptied while the next is being filled.
pub const SLOT: usize = 128 << 10;

/// How many requests of the most bytes fit in a memfd.
pub const SLOTS: usize = 2;

/// The memfd's length, bytes.
pub const BUFFER: usize = SLOT * SLOTS;

/// The most pieces of one request.
pub const MAX_PIECES: usize = 256;

/// The flag of a request that writes to the target's memory.
const WRITE: u32 = 1;

const HEADER: usize = 16;
const PIECE: usize = 16;

/// The longest packet, bytes.
pub const MAX_REQUEST: usize = HEADER + MAX_PIECES * PIECE;

/// An answer's length, bytes.
pub const ANSWER: usize = 16;

/// A part of a target's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First guest-physical address.
    pub gpa: u64,
    /// How many bytes.
    pub len: u32,
}

/// What a tool asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyRequest {
    /// Repeated by the answer.
    pub id: u32,
    /// Whether to copy into the target's memory; otherwise out of it.
    pub write: bool,
    /// Where in the memfd the first piece is.
    pub at: u32,
    /// The pieces, at least one, none empty.
    pub pieces: Vec<Piece>,
}

/// Why a request was not carried out to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// It was.
    Done,
    /// The view has ended, or the target; the news of it is on its way.
    Ended,
    /// The view does not reach the address.
    Hole,
    /// The view is read-only.
    ReadOnly,
    /// The VMM has no memory there.
    NoMemory,
    /// The view is being changed: the same request may succeed soon.
    Busy,
}

/// All of them, by their numbers.
const STATUSES: [Status; 6] =
    [Status::Done, Status::Ended, Status::Hole, Status::ReadOnly, Status::NoMemory, Status::Busy];

/// How far a request was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyAnswer {
    /// The request's id.
    pub id: u32,
    /// Why it ended.
    pub status: Status,
    /// How many pieces are copied whole.
    pub pieces: u32,
    /// How many bytes of the next one are.
    pub bytes: u32,
}

impl CopyRequest {
    /// Reads a packet; `None` for one that breaks a rule.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let (header, rest) = packet.split_first_chunk::<HEADER>()?;
        let [id, flags, at, reserved] = words(header);
        if flags & !WRITE != 0
            || reserved != 0
            || rest.is_empty()
            || rest.len() > MAX_PIECES * PIECE
        {
            return None;
        }
        let (pieces, odd) = rest.as_chunks::<PIECE>();
        let (mut decoded, mut sum) = (Vec::with_capacity(pieces.len()), 0usize);
        for piece in pieces {
            let [low, high, len, reserved] = words(piece);
            let gpa = u64::from(low) | u64::from(high) << 32;
            (len > 0 && reserved == 0).then_some(())?;
            sum = sum.checked_add(usize::try_from(len).ok()?)?;
            decoded.push(Piece { gpa, len });
        }
        let end = usize::try_from(at).ok()?.checked_add(sum)?;
        let fits = odd.is_empty() && sum <= SLOT && end <= BUFFER;
        fits.then_some(Self { id, write: flags & WRITE != 0, at, pieces: decoded })
    }

    /// Writes the packet.
    pub fn encode(&self) -> Vec<u8> {
        let mut packet = Vec::with_capacity(HEADER + self.pieces.len() * PIECE);
        for word in [self.id, u32::from(self.write), self.at, 0] {
            packet.extend(word.to_le_bytes());
        }
        for piece in &self.pieces {
            packet.extend(piece.gpa.to_le_bytes());
            packet.extend(piece.len.to_le_bytes());
            packet.extend([0; 4]);
        }
        packet
    }
}

impl CopyAnswer {
    /// Reads a packet; `None` for one that breaks a rule.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let [id, status, pieces, bytes] = words(packet.try_into().ok()?);
        let status = *STATUSES.get(usize::try_from(status).ok()?)?;
        Some(Self { id, status, pieces, bytes })
    }

    /// Writes the packet.
    pub fn encode(&self) -> [u8; ANSWER] {
        let mut packet = [0; ANSWER];
        let words = [self.id, self.status as u32, self.pieces, self.bytes];
        for (place, word) in packet.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&u32::to_le_bytes(word));
        }
        packet
    }
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|number| words.get(number).map_or(0, |word| u32::from_le_bytes(*word)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(at: u32, lens: &[u32]) -> CopyRequest {
        let pieces = lens.iter().map(|len| Piece { gpa: 0x1000, len: *len }).collect();
        CopyRequest { id: 7, write: false, at, pieces }
    }

    #[test]
    fn a_request_is_written_as_the_text_says() {
        let pieces = vec![Piece { gpa: 0x1_0000_2000, len: 3 }];
        let packet = CopyRequest { id: 5, write: true, at: 0x100, pieces }.encode();
        let words: Vec<u32> =
            packet.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [5, 1, 0x100, 0, 0x2000, 1, 3, 0]);
    }

    #[test]
    fn requests_that_leave_the_buffer_or_say_nothing_are_refused() {
        let slot = u32::try_from(SLOT).unwrap();
        for good in [request(0, &[1]), request(slot, &[slot]), request(3, &[5; MAX_PIECES])] {
            assert_eq!(CopyRequest::decode(&good.encode()), Some(good));
        }
        let bad = [
            request(0, &[]),
            request(0, &[0]),
            request(0, &[slot, 1]),
            request(slot + 1, &[slot]),
            request(u32::MAX, &[1]),
            request(0, &[u32::MAX, u32::MAX]),
            request(0, &[1; MAX_PIECES + 1]),
        ];
        for bad in bad {
            assert_eq!(CopyRequest::decode(&bad.encode()), None, "{bad:?}");
        }
        let good = request(0, &[1]).encode();
        for at in [4, 12, 28] {
            let mut packet = good.clone();
            packet[at] = 2;
            assert_eq!(CopyRequest::decode(&packet), None, "{at}");
        }
        for len in 0..good.len() {
            assert_eq!(CopyRequest::decode(&good[..len]), None);
        }
    }

    proptest! {
        #[test]
        fn any_packet_is_read_without_harm_and_written_as_it_was(
            mut packet in proptest::collection::vec(any::<u8>(), 0..100),
            fix: bool,
        ) {
            if fix && packet.len() >= 32 {
                packet[4..16].fill(0);
                packet[25..32].fill(0);
                packet.truncate(32);
            }
            if let Some(request) = CopyRequest::decode(&packet) {
                prop_assert_eq!(request.encode(), &packet[..]);
            }
            if let Some(answer) = CopyAnswer::decode(&packet) {
                prop_assert_eq!(&answer.encode()[..], &packet[..]);
            }
        }

        #[test]
        fn answers_are_read_as_they_were_written(id: u32, status in 0u8..6, pieces: u32, bytes: u32) {
            let packet = [id, status.into(), pieces, bytes].map(u32::to_le_bytes).concat();
            let answer = CopyAnswer::decode(&packet).unwrap();
            prop_assert_eq!((answer.id, answer.pieces, answer.bytes), (id, pieces, bytes));
            prop_assert_eq!(&answer.encode()[..], &packet[..]);
        }
    }
}
