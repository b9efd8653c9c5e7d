// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Token list of a view's descriptor page, as the host writes it.
//!
//! The broker adds a token before the tool gets it, and removes it when it was used or has expired.
//! The guest can write the page at any time: nothing but marks is read from it, and a mark counts
//! for the token that is listed now only.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvmmem_abi::token_list::{DIGEST_SIZE, Digest, MAX_TOKENS, digest_at, mark, used_at};
use rustix::io::Errno;

use super::descriptor::write;

/// The list of one page.
#[derive(Debug)]
pub struct TokenList {
    page: Arc<OwnedFd>,
    entries: [Option<Digest>; MAX_TOKENS],
}

impl TokenList {
    /// The list in a view's first page, empty.
    pub fn new(page: Arc<OwnedFd>) -> Self {
        Self { page, entries: [None; MAX_TOKENS] }
    }

    /// Lists a token; returns its entry, or `None` where the list is full.
    ///
    /// # Errors
    /// Where the page cannot be written.
    pub fn add(&mut self, digest: Digest) -> Result<Option<usize>, Errno> {
        let free = self.entries.iter_mut().enumerate().find(|(_, entry)| entry.is_none());
        let Some((index, entry)) = free else { return Ok(None) };
        write(&self.page, &digest, digest_at(index))?;
        *entry = Some(digest);
        Ok(Some(index))
    }

    /// Whether the guest's driver has used the token of an entry.
    pub fn is_used(&self, entry: usize) -> bool {
        let mut bytes = [0; 4];
        let digest = self.entries.get(entry).and_then(Option::as_ref);
        rustix::io::pread(&self.page, &mut bytes, used_at(entry) as u64) == Ok(bytes.len())
            && digest.is_some_and(|digest| u32::from_le_bytes(bytes) == mark(digest))
    }

    /// Withdraws the token of an entry; whether the driver had used it. From here on it does not.
    ///
    /// # Errors
    /// Where the page cannot be written: the token is still listed.
    pub fn remove(&mut self, entry: usize) -> Result<bool, Errno> {
        write(&self.page, &[0; DIGEST_SIZE], digest_at(entry))?;
        // After that write: the driver marks before it looks whether the digest is still there.
        let is_used = self.is_used(entry);
        if let Some(entry) = self.entries.get_mut(entry) {
            *entry = None;
        }
        Ok(is_used)
    }
}

#[cfg(test)]
mod tests {
    use kvmmem_abi::descriptor::Descriptor;
    use kvmmem_abi::native::{RIGHT_READ, STATE_OPEN, STATE_REVOKED};
    use kvmmem_abi::token_list::{DIGESTS_AT, END};

    use super::super::descriptor::Pages;
    use super::*;

    fn digest(n: usize) -> Digest {
        std::array::from_fn(|at| u8::try_from((n + 1) * 3 % 251 + at).unwrap())
    }

    fn pages() -> Pages {
        let descriptor =
            Descriptor { state: STATE_OPEN, rights: RIGHT_READ, ..Descriptor::default() };
        Pages::new(descriptor, Vec::new(), 1).unwrap()
    }

    fn list(pages: &Pages) -> TokenList {
        TokenList::new(Arc::clone(&pages.files()[0]))
    }

    fn bytes(pages: &Pages, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(rustix::io::pread(&pages.files()[0], &mut bytes, at as u64), Ok(len));
        bytes
    }

    fn guest_writes(pages: &Pages, at: usize, bytes: &[u8]) {
        rustix::io::pwrite(&pages.files()[0], bytes, at as u64).unwrap();
    }

    #[test]
    fn a_full_list_takes_no_token_until_one_is_removed() {
        let pages = pages();
        let mut list = list(&pages);
        for n in 0..MAX_TOKENS {
            assert_eq!(list.add(digest(n)), Ok(Some(n)));
            assert_eq!(bytes(&pages, digest_at(n), DIGEST_SIZE), digest(n));
        }
        assert_eq!(list.add(digest(64)), Ok(None));
        assert_eq!(list.remove(7), Ok(false));
        assert_eq!(bytes(&pages, digest_at(7), DIGEST_SIZE), [0; DIGEST_SIZE]);
        assert_eq!(list.add(digest(64)), Ok(Some(7)));
        assert_eq!(list.add(digest(65)), Ok(None));
    }

    #[test]
    fn a_mark_counts_for_the_token_that_it_was_made_for() {
        let pages = pages();
        let mut list = list(&pages);
        list.add(digest(1)).unwrap();
        assert!(!list.is_used(0));
        guest_writes(&pages, used_at(0), &mark(&digest(1)).to_le_bytes());
        assert!(list.is_used(0));
        assert_eq!(list.remove(0), Ok(true));
        assert!(!list.is_used(0));
        // The mark is still there.
        list.add(digest(2)).unwrap();
        assert!(!list.is_used(0));
        assert_eq!(list.remove(0), Ok(false));
        assert!(!list.is_used(MAX_TOKENS) && !list.is_used(usize::MAX / 8));
    }

    #[test]
    fn a_guest_that_scribbles_changes_nothing_that_is_added_later() {
        let pages = pages();
        let mut list = list(&pages);
        list.add(digest(1)).unwrap();
        guest_writes(&pages, DIGESTS_AT, &[0xa5; END - DIGESTS_AT]);
        assert!(!list.is_used(0));
        list.add(digest(2)).unwrap();
        assert_eq!(bytes(&pages, digest_at(1), DIGEST_SIZE), digest(2));
        assert_eq!((list.remove(0), list.remove(1)), (Ok(false), Ok(false)));
    }

    #[test]
    fn a_change_of_the_view_leaves_the_list() {
        let mut pages = pages();
        let mut list = list(&pages);
        list.add(digest(1)).unwrap();
        pages.set_state(STATE_REVOKED).unwrap();
        assert_eq!(bytes(&pages, digest_at(0), DIGEST_SIZE), digest(1));
    }
}
