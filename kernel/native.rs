// SPDX-License-Identifier: GPL-2.0-only
//! Ioctls of views ([`crate::abi::native`]): INFO, ATTACH, RANGES, DETACH, STATS.

use kernel::fs::File;
use kernel::prelude::*;
use kernel::uaccess::{UserPtr, UserSlice};

use crate::abi::descriptor::MAX_RANGES;
use crate::abi::native::{
    Attach, Info, Range, Ranges, Stats, ATTACH_READ_ONLY, FEATURE_DEVICES, FEATURE_HUGE_1G,
    FEATURE_HUGE_2M, FEATURE_REGIONS, FEATURE_SEEK, FEATURE_VIEWS, VERSION,
};
use crate::attachment::AttachCall;
use crate::file::ViewFile;
use crate::hypercall::{self, Transport};
use crate::power::UseGuard;
use crate::sys::cpu::has_1g_pages;
use crate::watch;

/// INFO: what there is.
pub(crate) fn info(to: UserPtr) -> Result {
    let mut features = match hypercall::transport() {
        Transport::Windows => FEATURE_VIEWS | FEATURE_HUGE_2M | FEATURE_SEEK,
        Transport::Devices => FEATURE_VIEWS | FEATURE_HUGE_2M | FEATURE_DEVICES,
        Transport::None => 0,
    };
    if features & FEATURE_VIEWS != 0 && has_1g_pages() {
        features |= FEATURE_HUGE_1G;
    }
    if crate::offers_regions() {
        features |= FEATURE_REGIONS;
    }
    let info = Info {
        version: VERSION,
        features,
        max_ranges: MAX_RANGES as u32,
        event_ms: watch::event_ms(),
        reserved: [0; 4],
    };
    UserSlice::new(to, size_of::<Info>()).writer().write(&info)
}

impl ViewFile {
    /// ATTACH: `EISCONN` where the file has a view, `EINVAL` for unknown flags.
    pub(crate) fn attach(&self, file: &File, from: UserPtr) -> Result {
        let mut reader = UserSlice::new(from, size_of::<Attach>()).reader();
        let call = AttachCall::read_token(&mut reader)?;
        let (view_flags, reserved) = (reader.read::<u32>()?, reader.read::<u32>()?);
        if view_flags & !ATTACH_READ_ONLY != 0 || reserved != 0 {
            return Err(EINVAL);
        }
        let _one = self.attaching.lock();
        if self.has_view() || self.regions.lock().is_open() {
            return Err(EISCONN);
        }
        let _beginning = UseGuard::begin()?;
        let view = self.open_view(file, call, view_flags)?;
        self.set_view(view);
        Ok(())
    }

    /// RANGES: as many as there is room for.
    pub(crate) fn ranges(&self, at: UserPtr) -> Result {
        let (mut reader, mut writer) = UserSlice::new(at, size_of::<Ranges>()).reader_writer();
        let mut answer = reader.read::<Ranges>()?;
        let contents = self.view()?.take_event();
        answer.generation = contents.generation;
        answer.state = contents.state();
        answer.rights = contents.rights;
        answer.uuid = contents.uuid;
        let mut ranges = KVec::new();
        if let Ok(window) = &contents.window {
            ranges.reserve(window.ranges().len(), GFP_KERNEL)?;
            for range in window.ranges() {
                ranges.push(range, GFP_KERNEL)?;
            }
        }
        // Whoever takes the windows away waits for those who use them; writing to user memory may
        // take any time.
        drop(contents);
        answer.count = ranges.len() as u32;
        let room = UserPtr::from_addr(usize::try_from(answer.ranges)?);
        let written = ranges.len().min(answer.capacity as usize);
        let mut room = UserSlice::new(room, written * size_of::<Range>()).writer();
        for range in ranges.iter().take(written) {
            room.write(range)?;
        }
        writer.write(&answer)
    }

    /// DETACH.
    pub(crate) fn detach_file(&self) -> Result {
        let _one = self.attaching.lock();
        self.detach()?;
        self.regions.lock().forget();
        Ok(())
    }

    /// STATS.
    pub(crate) fn stats(&self, to: UserPtr) -> Result {
        let view = self.view()?;
        let stats = Stats {
            faults_4k: view.faults.small.value(),
            faults_2m: view.faults.huge_2m.value(),
            faults_1g: view.faults.huge_1g.value(),
            faults_refused: view.faults.refused.value(),
            read_bytes: view.read_bytes.value(),
            written_bytes: view.written_bytes.value(),
            events: view.events.value(),
            instance: view.contents().instance,
        };
        UserSlice::new(to, size_of::<Stats>())
            .writer()
            .write(&stats)
    }
}
