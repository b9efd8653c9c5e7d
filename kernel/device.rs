// SPDX-License-Identifier: GPL-2.0-only
//! `/dev/kvmmem`: the file operations. Those of views go to [`crate::view`], v1's to
//! [`crate::page_file`].
//!
//! Opening allocates the file's structure only. What views and v1 need is made by their first call.

use core::ops::Deref;

use kernel::fs::{File, Kiocb};
use kernel::iov::{IovIterDest, IovIterSource};
use kernel::miscdevice::{MiscDevice, MiscDeviceRegistration};
use kernel::prelude::*;
use kernel::seq_file::{seq_print, SeqFile};
use kernel::sync::poll::PollTable;
use kernel::sync::{new_mutex, Arc, Mutex, SetOnce};
use kernel::uaccess::UserPtr;

use crate::abi::ioctl::{MEM_MAP, MEM_UNMAP};
use crate::abi::{native as view, region};
use crate::attachment::Attachment;
use crate::contents::Contents;
use crate::knobs;
use crate::native;
use crate::page_file::PageFile;
use crate::power::UseGuard;
use crate::stats;
use crate::sys::area::{file_offset, Areas, Fault, FaultError, FaultResult, NewArea};
use crate::sys::misc::Device;
use crate::view::View;
use crate::watch::WatchedView;

/// One open file of the device. Its pages of v1 are bound to the process that opened it; its view
/// is not.
#[pin_data]
pub(crate) struct OpenFile {
    #[pin]
    pages: PageFile,
    #[pin]
    inner: Mutex<Inner>,
    view: SetOnce<WatchedView>,
    /// Held while the view is made.
    #[pin]
    making: Mutex<()>,
}

/// Whether a file is an inner one, which the module opened for v1's pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inner {
    No,
    /// It is. The page that is being mapped, by its address in the process and in the target: no
    /// other area of memory may show it, as only the module may map of it.
    Yes(Option<(u64, u64)>),
}

impl OpenFile {
    /// Makes an inner file of it, with the view that `attach` opens.
    pub(crate) fn show_inner(
        &self,
        file: &File,
        attach: impl FnOnce() -> Result<Attachment>,
    ) -> Result {
        let view = self.make_view(file)?;
        let _one = view.attaching.lock();
        let _beginning = UseGuard::begin()?;
        view.set(Contents::of(attach, 0)?);
        self.expect_page(None);
        Ok(())
    }

    /// Says which page is being mapped of this inner file.
    pub(crate) fn expect_page(&self, page: Option<(u64, u64)>) {
        *self.inner.lock() = Inner::Yes(page);
    }

    /// What the file has of views; the first call makes it.
    fn make_view(&self, file: &File) -> Result<&Arc<View>> {
        if self.view.as_ref().is_none() {
            let _one = self.making.lock();
            if self.view.as_ref().is_none() {
                self.view.populate(WatchedView::new(View::new(file)?));
            }
        }
        self.view()
    }

    /// `ENOTCONN` where no call has made it.
    pub(crate) fn view(&self) -> Result<&Arc<View>> {
        self.view.as_ref().map(Deref::deref).ok_or(ENOTCONN)
    }
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        let file = try_pin_init!(Self {
            pages <- PageFile::new()?,
            inner <- new_mutex!(Inner::No, "kvmmem_inner"),
            view: SetOnce::new(),
            making <- new_mutex!((), "kvmmem_making"),
        }? Error);
        KBox::pin_init(file, GFP_KERNEL_ACCOUNT)
    }

    fn ioctl(this: Pin<&Self>, file: &File, cmd: u32, arg: usize) -> Result<isize> {
        let at = UserPtr::from_addr(arg);
        match cmd {
            MEM_MAP => this.pages.map(file, arg)?,
            MEM_UNMAP => this.pages.unmap(arg)?,
            view::INFO => native::info(at)?,
            view::ATTACH => this.make_view(file)?.attach(at)?,
            view::RANGES => this.view()?.ranges(at)?,
            view::DETACH => this.view()?.detach_file()?,
            view::STATS => this.view()?.stats(at)?,
            region::MEM_OPEN | region::MEM_MAP | region::MEM_UNMAP if crate::offers_regions() => {
                let view = this.make_view(file)?;
                match cmd {
                    region::MEM_OPEN => view.region_open(at)?,
                    region::MEM_MAP => view.region_map(at)?,
                    _ => view.region_unmap(arg as u64)?,
                }
            }
            _ => knobs::ioctl(cmd, arg)?,
        }
        Ok(0)
    }

    fn read_iter(mut kiocb: Kiocb<'_, Pin<KBox<Self>>>, to: &mut IovIterDest<'_>) -> Result<usize> {
        let (position, len) = (kiocb.ki_pos(), to.len());
        let count = kiocb.file().view()?.transfer(position, len, false, to)?;
        *kiocb.ki_pos_mut() += count as i64;
        Ok(count)
    }

    fn write_iter(
        mut kiocb: Kiocb<'_, Pin<KBox<Self>>>,
        from: &mut IovIterSource<'_>,
    ) -> Result<usize> {
        let (position, len) = (kiocb.ki_pos(), from.len());
        let count = kiocb.file().view()?.transfer(position, len, true, from)?;
        *kiocb.ki_pos_mut() += count as i64;
        Ok(count)
    }

    fn show_fdinfo(this: Pin<&Self>, m: &SeqFile, _file: &File) {
        let usage = this.pages.usage();
        seq_print!(m, "kvmmem-mapped:\t{}\n", usage.mapped);
        seq_print!(m, "kvmmem-quarantined:\t{}\n", usage.quarantined);
        seq_print!(m, "kvmmem-limit:\t{}\n", usage.limit);
        let Ok(view) = this.view() else { return };
        let contents = view.contents();
        if let Ok(session) = contents.session() {
            let descriptor = &contents.descriptor;
            seq_print!(m, "kvmmem-view-state:\t{}\n", descriptor.state);
            seq_print!(m, "kvmmem-view-generation:\t{}\n", descriptor.generation);
            if let Some(gpa) = session.host.gpa() {
                seq_print!(m, "kvmmem-view-descriptor:\t{gpa:#x}\n");
            }
        }
    }
}

impl Device for OpenFile {
    fn seek(&self, current: i64, offset: i64, whence: u32) -> Result<i64> {
        self.view()?.seek(current, offset, whence)
    }

    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        // Made here too, so that those who wait from before ATTACH are woken after it.
        self.make_view(file)
            .map_or(kernel::bindings::POLLERR, |view| view.poll(file, table))
    }

    fn map(&self, area: &NewArea<'_, Self>) -> Result {
        let inner = *self.inner.lock();
        if inner == Inner::No {
            return self.view()?.mmap(area);
        }
        let page = file_offset(area).map(|gpa| (area.start() as u64, gpa));
        if page.is_none() || inner != Inner::Yes(page) {
            // As by remap_file_pages(2).
            return Err(EACCES);
        }
        self.view()?.mmap(area)?;
        // A child gets nothing of it.
        area.set_dontcopy();
        area.count();
        stats::MAPPED.add_one();
        Ok(())
    }
}

impl Areas for OpenFile {
    fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError> {
        self.view().map_err(|_| FaultError::Bus)?.fault(fault)
    }

    fn area_opened() {
        stats::MAPPED.add_one();
    }

    fn area_closed() {
        stats::MAPPED.subtract_one();
    }
}
