// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much of memory the engine gets at a time, and how far a match may reach.

use crate::scan::places::Piece;

/// Bytes in which beginnings of matches are looked for at a time.
pub(super) const PIECE: u64 = 256 << 10;

/// How far a match may reach beyond its piece.
pub(super) const REACH: u64 = 4096;

/// One after the last byte at which the piece is read.
pub(super) fn end(piece: &Piece) -> u64 {
    piece.starts.end.saturating_add(REACH).min(piece.run.end)
}
