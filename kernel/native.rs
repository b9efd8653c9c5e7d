// SPDX-License-Identifier: GPL-2.0-only
//! Ioctls of views ([`crate::abi::native`]): INFO, ATTACH, RANGES, DETACH, STATS.

use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::uaccess::{UserPtr, UserSlice};

use crate::abi::descriptor::MAX_RANGES;
use crate::abi::native::{
    Attach, Info, Range, Ranges, Stats, ATTACH_READ_ONLY, FEATURE_DEVICES, FEATURE_HUGE_1G,
    FEATURE_HUGE_2M, FEATURE_REGIONS, FEATURE_SEEK, FEATURE_VIEWS, VERSION,
};
use crate::attachment::AttachCall;
use crate::contents::Contents;
use crate::hypercall::{self, Transport};
use crate::power::UseGuard;
use crate::sys::cpu::has_1g_pages;
use crate::view::View;
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

impl View {
    /// ATTACH: `EISCONN` where the file has a view, `EINVAL` for unknown flags.
    pub(crate) fn attach(self: &Arc<Self>, from: UserPtr) -> Result {
        let mut reader = UserSlice::new(from, size_of::<Attach>()).reader();
        let call = AttachCall::read_token(&mut reader)?;
        let (view_flags, reserved) = (reader.read::<u32>()?, reader.read::<u32>()?);
        if view_flags & !ATTACH_READ_ONLY != 0 || reserved != 0 {
            return Err(EINVAL);
        }
        let _one = self.attaching.lock();
        if self.contents().session().is_ok() || self.regions.lock().is_open() {
            return Err(EISCONN);
        }
        let _beginning = UseGuard::begin()?;
        self.set(Contents::open(call, view_flags)?);
        Ok(())
    }

    /// RANGES: as many as there is room for.
    pub(crate) fn ranges(&self, at: UserPtr) -> Result {
        let (mut reader, mut writer) = UserSlice::new(at, size_of::<Ranges>()).reader_writer();
        let mut answer = reader.read::<Ranges>()?;
        let contents = self.take_event();
        contents.session()?;
        answer.generation = contents.descriptor.generation;
        answer.state = contents.descriptor.state;
        answer.rights = contents.descriptor.rights;
        answer.uuid = contents.descriptor.uuid;
        let mut ranges = KVec::new();
        if let Ok(window) = &contents.window {
            ranges.reserve(window.ranges().len(), GFP_KERNEL)?;
            for range in window.ranges() {
                ranges.push(range, GFP_KERNEL)?;
            }
        }
        // The host's next change waits for the reader; writing to user memory may take any time.
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
        let contents = self.contents();
        let session = contents.session()?;
        let stats = Stats {
            faults_4k: session.faults.small.value(),
            faults_2m: session.faults.huge_2m.value(),
            faults_1g: session.faults.huge_1g.value(),
            faults_refused: session.faults.refused.value(),
            read_bytes: session.read_bytes.value(),
            written_bytes: session.written_bytes.value(),
            events: session.events.value(),
            instance: contents.descriptor.instance,
        };
        drop(contents);
        UserSlice::new(to, size_of::<Stats>())
            .writer()
            .write(&stats)
    }
}
