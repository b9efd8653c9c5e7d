// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Token list: the tokens that tools of an introspector got over KVMI and have not used yet, in the
//! descriptor page of the view that is plugged in for them ([`FLAG_TOKENS`]).
//!
//! The list has [`MAX_TOKENS`] entries and is not covered by the page's generation. The host writes
//! an entry's digest before the tool gets the token, and clears it when the token has been used or
//! has expired. The driver marks an entry as used, looks whether the digest is still there, and
//! serves the token only then: a token that the host has withdrawn meanwhile is not served, and one
//! that was served is marked when the host looks.
//!
//! | offset | size | field |
//! |---|---|---|
//! | [`DIGESTS_AT`] | 64 × 24 | first 24 bytes of the SHA-256 of a token; 0 where the entry is free |
//! | [`USED_AT`] | 64 × 4 | written by the driver: [`mark`] of the digest that it has used |
//!
//! [`FLAG_TOKENS`]: super::descriptor::FLAG_TOKENS

use super::descriptor;
use super::ioctl::PAGE_SIZE;

/// The most tokens that a page lists.
pub const MAX_TOKENS: usize = 64;

/// Bytes of a digest.
pub const DIGEST_SIZE: usize = 24;

/// Offset of the digests in the page.
pub const DIGESTS_AT: usize = descriptor::SIZE;

/// Offset of the marks in the page.
pub const USED_AT: usize = DIGESTS_AT + MAX_TOKENS * DIGEST_SIZE;

/// Where the list ends in the page.
pub const END: usize = USED_AT + MAX_TOKENS * 4;

// Both are in one page.
const _: () = assert!(END as u64 <= PAGE_SIZE);

/// A token's digest.
pub type Digest = [u8; DIGEST_SIZE];

/// A token's digest, from its SHA-256.
pub fn digest(sha256: &[u8; 32]) -> Digest {
    let mut digest = [0; DIGEST_SIZE];
    for (to, from) in digest.iter_mut().zip(sha256) {
        *to = *from;
    }
    digest
}

/// Offset of an entry's digest in the page.
pub const fn digest_at(entry: usize) -> usize {
    DIGESTS_AT + entry * DIGEST_SIZE
}

/// Offset of an entry's mark in the page.
pub const fn used_at(entry: usize) -> usize {
    USED_AT + entry * 4
}

/// What the driver writes at [`used_at`] once it has used the token with this digest. An entry that
/// is used again has another digest, which an earlier mark does not fit.
pub fn mark(digest: &Digest) -> u32 {
    let [a, b, c, d, ..] = *digest;
    u32::from_le_bytes([a, b, c, d])
}
