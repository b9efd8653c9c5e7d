// SPDX-License-Identifier: GPL-2.0-only
//! v1 where the host is not called: MAP puts one page of a view in the place of the tool's page.
//!
//! [`crate::page_file`] has them, one set for each open file. The view is one that lists the token
//! (see [`crate::slots`]). The page is an area of memory of an *inner file*: the device, opened
//! once more by the module, with that view. So an area does not keep the tool's own file open, and
//! closing that is noticed.
//!
//! What is mapped where, the process's areas say: UNMAP, munmap, exec and exit take an area away,
//! and nothing else has to be undone. The set of addresses is for closing the file only, and is
//! compared with the areas then.

use kernel::fs::File;
use kernel::mm::{Mm, MmWithUser};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::transmute::AsBytes;

use crate::abi::ioctl::MemMap;
use crate::attachment::Attachment;
use crate::device::OpenFile;
use crate::page::check_memory;
use crate::slots::{self, ListedToken};
use crate::stats;
use crate::sys::reopen::open_again;
use crate::sys::secret::sha256;
use crate::sys::{area, misc, mmap};
use crate::table::map::Map;
use crate::tree::{self, Tree};
use crate::view::View;

/// The device, opened once more, and where pages of its view are mapped by v1.
struct InnerFile {
    file: ARef<File>,
    mapped: Tree<()>,
    count: u64,
}

impl InnerFile {
    /// One that shows the view which lists a token.
    fn open(outer: &File, token: &ListedToken) -> Result<Self> {
        let file = open_again(outer)?;
        let opened = misc::data::<OpenFile>(&file).ok_or(EINVAL)?;
        opened.show_inner(&file, || token.share().map(Attachment::Devices))?;
        Ok(Self {
            file,
            mapped: Tree::default(),
            count: 0,
        })
    }

    fn opened(&self) -> Result<&OpenFile> {
        misc::data(&self.file).map(Pin::get_ref).ok_or(EINVAL)
    }

    fn view(&self) -> Result<&Arc<View>> {
        self.opened()?.view()
    }

    /// Whether it shows the view that lists a token.
    fn shows(&self, token: &ListedToken) -> bool {
        self.view().is_ok_and(|view| {
            let contents = view.contents();
            let session = contents.session();
            contents.window.is_ok() && session.is_ok_and(|session| session.host.lists(token))
        })
    }

    /// Whether the target's page at `gpa` may be mapped: `EFAULT` where there is none, `EPERM`
    /// where it may not be written, as v1 always may.
    fn check(&self, gpa: u64) -> Result {
        let contents = self.view()?.look();
        if !contents.window()?.contains(gpa) {
            return Err(EFAULT);
        }
        if contents.is_writable() {
            Ok(())
        } else {
            Err(EPERM)
        }
    }

    /// Forgets addresses where nothing of it is mapped any more.
    fn prune(&mut self, mm: &MmWithUser) {
        let mut from = 0;
        while let Some((gva, ())) = self.mapped.first_from(from).map(|(gva, _)| (gva, ())) {
            if !self.is_at(mm, gva) {
                self.remove(gva);
            }
            from = gva + 1;
        }
    }

    fn remove(&mut self, gva: u64) {
        if self.mapped.remove(gva).is_some() {
            self.count -= 1;
        }
    }

    fn is_at(&self, mm: &MmWithUser, gva: u64) -> bool {
        let lock = mm.mmap_read_lock();
        lock.vma_lookup(gva as usize)
            .is_some_and(|found| area::is_of(found, &self.file))
    }
}

/// The pages that v1 has mapped through an open file. Dropping them undoes the mappings.
pub(crate) struct WindowPages {
    /// The opener's memory.
    mm: ARef<Mm>,
    /// An ended view's inner file stays while pages of it are mapped.
    files: Pin<KBox<Mutex<KVec<InnerFile>>>>,
}

impl WindowPages {
    pub(crate) fn new(mm: ARef<Mm>) -> Result<Self> {
        let files = new_mutex!(KVec::new(), "kvmmem_inner_files");
        let files = KBox::pin_init(files, GFP_KERNEL_ACCOUNT)?;
        Ok(Self { mm, files })
    }

    /// MAP: the caller, whose memory is `mm`, is the opener of `outer`; the addresses are pages.
    pub(crate) fn map(&self, outer: &File, mm: &MmWithUser, request: &MemMap) -> Result {
        let (gpa, gva) = (request.gpa, request.gva);
        let slot = tree::slot()?;
        let mut files = self.files.lock();
        if is_mapped(mm, gva as usize) {
            return Err(EALREADY);
        }
        check_memory(mm, gva as usize)?;
        let token = slots::find_token(&sha256(AsBytes::as_bytes(&request.token.token)))?;
        let limit = crate::max_pages_per_file();
        if count(&files) >= limit {
            files.iter_mut().for_each(|inner| inner.prune(mm));
        }
        files.retain(|inner| inner.count > 0 || inner.shows(&token));
        if count(&files) >= limit {
            return Err(ENOMEM);
        }
        let result = Self::map_from(&mut files, outer, &token, gva, gpa);
        match result {
            Ok(inner) => {
                if inner.mapped.get(gva).is_none() {
                    inner.mapped.insert(slot, gva, ());
                    inner.count += 1;
                }
                stats::TOTAL.add_one();
                Ok(())
            }
            Err(error) => {
                stats::REFUSED.add_one();
                Err(error_of_v1(error))
            }
        }
    }

    fn map_from<'a>(
        files: &'a mut KVec<InnerFile>,
        outer: &File,
        token: &ListedToken,
        gva: u64,
        gpa: u64,
    ) -> Result<&'a mut InnerFile> {
        let index = match files.iter().position(|inner| inner.shows(token)) {
            Some(index) => index,
            None => {
                files.reserve(1, GFP_KERNEL_ACCOUNT)?;
                files.push(InnerFile::open(outer, token)?, GFP_KERNEL_ACCOUNT)?;
                files.len() - 1
            }
        };
        let inner = files.get_mut(index).ok_or(ENOMEM)?;
        inner.check(gpa)?;
        token.use_once()?;
        let opened = inner.opened()?;
        opened.expect_page(Some((gva, gpa)));
        let mapped = mmap::map_page(&inner.file, gva as usize, gpa);
        opened.expect_page(None);
        mapped.map(|()| inner)
    }

    /// UNMAP of a page that any file of the process, whose memory is `mm`, has mapped: `ENOENT`
    /// where there is none.
    ///
    /// If another thread maps something at `gva` between the check and the replacement, that
    /// mapping is lost: `vm_mmap` offers no check under its lock for an anonymous area, which MAP
    /// requires.
    pub(crate) fn unmap(&self, mm: &MmWithUser, gva: usize) -> Result {
        let mut files = self.files.lock();
        if !is_mapped(mm, gva) {
            return Err(ENOENT);
        }
        mmap::map_zero_page(gva)?;
        files.iter_mut().for_each(|inner| inner.remove(gva as u64));
        Ok(())
    }

    /// How many pages are mapped, as far as is known.
    pub(crate) fn count(&self) -> u64 {
        count(&self.files.lock())
    }
}

impl Drop for WindowPages {
    /// Undoes all mappings, as the file is closed. By its opener: with zero pages in their places.
    /// By another process: accesses raise SIGBUS from here on. Another thread's mapping may be
    /// lost, as in [`Self::unmap`].
    fn drop(&mut self) {
        let task = current!();
        let is_opener = |mm: &&MmWithUser| core::ptr::eq(mm.as_raw(), self.mm.as_raw());
        let mm = task.mm().filter(is_opener);
        let mut files = self.files.lock();
        while let Some(inner) = files.pop() {
            let mut from = 0;
            while let (Some(mm), Some(gva)) =
                (mm, inner.mapped.first_from(from).map(|(gva, _)| gva))
            {
                // An area that this cannot replace shows nothing either, as the view is detached.
                if inner.is_at(mm, gva) {
                    let _ = mmap::map_zero_page(gva as usize);
                }
                from = gva + 1;
            }
            if let Ok(view) = inner.view() {
                let _ = view.detach_file();
            }
        }
    }
}

fn count(files: &KVec<InnerFile>) -> u64 {
    files.iter().map(|inner| inner.count).sum()
}

/// Whether v1 has mapped a page at `gva`.
fn is_mapped(mm: &MmWithUser, gva: usize) -> bool {
    let lock = mm.mmap_read_lock();
    lock.vma_lookup(gva)
        .is_some_and(area::is_counted::<OpenFile>)
}

/// A view's errors, within the set that v1's ioctls may return.
fn error_of_v1(error: Error) -> Error {
    match error {
        EKEYREVOKED | ESTALE | ENOTCONN => ENOENT,
        EAGAIN | EFAULT | EIO | ENOENT | ENOMEM | EPERM => error,
        _ => EAGAIN,
    }
}
