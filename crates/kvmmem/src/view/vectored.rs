// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads of many pieces: of several addresses in one call, and of one address in several.

use super::error::ViewError;

/// A vectored read ended early. All pieces before [`VectoredError::piece`] are filled. That piece
/// may be filled in part; of the pieces after it, any may be filled or not. To skip it, read the
/// pieces after it.
#[derive(Debug, thiserror::Error)]
#[error("piece {piece} was not read")]
pub struct VectoredError {
    /// Index of the first piece that was not filled.
    pub piece: usize,
    /// Why.
    #[source]
    pub source: ViewError,
}

/// The pieces from the first one on that have at most `limit` bytes together, at least one piece.
pub(super) fn batch<'p, 'b>(
    pieces: &'p mut [(u64, &'b mut [u8])],
    limit: usize,
) -> &'p mut [(u64, &'b mut [u8])] {
    let mut sum = 0usize;
    let mut fits = |(_, bytes): &(u64, &mut [u8])| {
        sum = sum.saturating_add(bytes.len());
        sum <= limit
    };
    let count = pieces.iter().take_while(|piece| fits(piece)).count().max(1);
    pieces.get_mut(..count).unwrap_or_default()
}

/// Fills all of `buf` with what is at `gpa`. `read` copies at least one byte, and returns how many.
pub(super) fn fill(
    mut gpa: u64,
    mut buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<usize, ViewError>,
) -> Result<(), ViewError> {
    while !buf.is_empty() {
        let count = read(gpa, buf)?;
        gpa = gpa.saturating_add(count as u64);
        buf = buf.get_mut(count..).unwrap_or_default();
    }
    Ok(())
}
