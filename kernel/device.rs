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
use crate::knobs;
use crate::native;
use crate::page_file::PageFile;
use crate::sys::area::{Areas, Fault, FaultError, FaultResult, NewArea};
use crate::sys::misc::Device;
use crate::view::View;
use crate::watch::WatchedView;

/// One open file of the device. Its pages of v1 are bound to the process that opened it; its view
/// is not.
#[pin_data]
pub(crate) struct OpenFile {
    #[pin]
    pages: PageFile,
    view: SetOnce<WatchedView>,
    /// Held while the view is made.
    #[pin]
    making: Mutex<()>,
}

impl OpenFile {
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
    fn view(&self) -> Result<&Arc<View>> {
        self.view.as_ref().map(Deref::deref).ok_or(ENOTCONN)
    }
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        let file = try_pin_init!(Self {
            pages <- PageFile::new()?,
            view: SetOnce::new(),
            making <- new_mutex!((), "kvmmem_making"),
        }? Error);
        KBox::pin_init(file, GFP_KERNEL_ACCOUNT)
    }

    fn ioctl(this: Pin<&Self>, file: &File, cmd: u32, arg: usize) -> Result<isize> {
        let at = UserPtr::from_addr(arg);
        match cmd {
            MEM_MAP => this.pages.map(arg)?,
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
        self.view()?.mmap(area)
    }
}

impl Areas for OpenFile {
    fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError> {
        self.view().map_err(|_| FaultError::Bus)?.fault(fault)
    }
}
