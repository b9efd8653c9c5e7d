// SPDX-License-Identifier: GPL-2.0-only
//! `/dev/kvmmem`: the file operations. Those of views go to [`crate::file`], v1's to
//! [`crate::page_file`].

use kernel::fs::{File, Kiocb};
use kernel::iov::{IovIterDest, IovIterSource};
use kernel::miscdevice::{MiscDevice, MiscDeviceRegistration};
use kernel::mm::virt::VmaRef;
use kernel::prelude::*;
use kernel::seq_file::{seq_print, SeqFile};
use kernel::sync::poll::PollTable;
use kernel::uaccess::UserPtr;

use crate::abi::ioctl::{MEM_MAP, MEM_UNMAP};
use crate::abi::{native as view, region};
use crate::file::ViewFile;
use crate::knobs;
use crate::native;
use crate::page_file::PageFile;
use crate::sys::area::{Areas, Fault, FaultError, FaultResult, NewArea};
use crate::sys::misc::Device;

/// One open file of the device. Its pages of v1 are bound to the process that opened it; its view
/// is not.
pub(crate) struct OpenFile {
    pages: Pin<KBox<PageFile>>,
    view: Pin<KBox<ViewFile>>,
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = KBox<Self>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        let opened = Self {
            pages: PageFile::new()?,
            view: ViewFile::new()?,
        };
        Ok(KBox::new(opened, GFP_KERNEL_ACCOUNT)?)
    }

    fn ioctl(this: &Self, file: &File, cmd: u32, arg: usize) -> Result<isize> {
        let at = UserPtr::from_addr(arg);
        match cmd {
            MEM_MAP => this.pages.map(arg)?,
            MEM_UNMAP => this.pages.unmap(arg)?,
            view::INFO => native::info(at)?,
            view::ATTACH => this.view.attach(file, at)?,
            view::RANGES => this.view.ranges(at)?,
            view::DETACH => this.view.detach_file()?,
            view::STATS => this.view.stats(at)?,
            region::MEM_OPEN if crate::offers_regions() => this.view.region_open(at)?,
            region::MEM_MAP if crate::offers_regions() => this.view.region_map(file, at)?,
            region::MEM_UNMAP if crate::offers_regions() => this.view.region_unmap(arg as u64)?,
            _ => knobs::ioctl(cmd, arg)?,
        }
        Ok(0)
    }

    fn read_iter(mut kiocb: Kiocb<'_, KBox<Self>>, to: &mut IovIterDest<'_>) -> Result<usize> {
        let count = kiocb.file().view.read(kiocb.ki_pos(), to)?;
        *kiocb.ki_pos_mut() += count as i64;
        Ok(count)
    }

    fn write_iter(mut kiocb: Kiocb<'_, KBox<Self>>, from: &mut IovIterSource<'_>) -> Result<usize> {
        let count = kiocb.file().view.write(kiocb.ki_pos(), from)?;
        *kiocb.ki_pos_mut() += count as i64;
        Ok(count)
    }

    fn show_fdinfo(this: &Self, m: &SeqFile, _file: &File) {
        let usage = this.pages.usage();
        seq_print!(m, "kvmmem-mapped:\t{}\n", usage.mapped);
        seq_print!(m, "kvmmem-quarantined:\t{}\n", usage.quarantined);
        seq_print!(m, "kvmmem-limit:\t{}\n", usage.limit);
        if let Ok(view) = this.view.view() {
            let contents = view.contents();
            seq_print!(m, "kvmmem-view-state:\t{}\n", contents.state());
            seq_print!(m, "kvmmem-view-generation:\t{}\n", contents.generation);
            if let Some(gpa) = view.host().gpa() {
                seq_print!(m, "kvmmem-view-descriptor:\t{gpa:#x}\n");
            }
        }
    }
}

impl Device for OpenFile {
    fn seek(&self, current: i64, offset: i64, whence: u32) -> Result<i64> {
        self.view.seek(current, offset, whence)
    }

    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        self.view.poll(file, table)
    }

    fn map(&self, area: &NewArea<'_, Self>) -> Result {
        self.view.mmap(area)
    }
}

impl Areas for OpenFile {
    fn area_opened(&self, area: &VmaRef) {
        self.view.area_opened(area);
    }

    fn area_closed(&self, area: &VmaRef) {
        self.view.area_closed(area);
    }

    fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError> {
        self.view.fault(fault)
    }
}
