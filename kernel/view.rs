// SPDX-License-Identifier: GPL-2.0-only
//! View: the memory of a target that an open file can reach, at one generation after another.
//!
//! [`crate::file`] owns it, [`crate::watch`] updates it. The invariant: a change is
//! acknowledged to the host only once no page of the earlier generation is mapped or used.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::poll::PollCondVarBox;
use kernel::sync::{new_mutex, Arc, Mutex, UniqueArc};
use kernel::time::delay::fsleep;
use kernel::time::Delta;
use kernel::workqueue::{new_delayed_work, DelayedWork};

use crate::abi::descriptor::Descriptor;
use crate::abi::native::{ATTACH_READ_ONLY, RIGHT_WRITE, STATE_GONE, STATE_OPEN, STATE_REVOKED};
use crate::attachment::{AttachCall, Attachment};
use crate::hypercall::{self, Transport};
use crate::snapshot::Snapshot;
use crate::stats::{self, Counter, Faults};
use crate::sys::mapping::AddressSpace;
use crate::sys::task::is_killed;
use crate::window::Window;

/// The number of the view that is opened next. Areas of memory carry it, so that those of an
/// earlier view of the same file are told apart.
static NEXT_NUMBER: Atomic<i64> = Atomic::new(1);

/// How often, and at which interval, a system call looks again while the host is changing the view.
pub(crate) const TRIES: u32 = 1000;
pub(crate) const PAUSE: Delta = Delta::from_millis(1);

/// Why a view has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndCause {
    /// The grant was revoked.
    Revoked,
    /// The target has exited, or the host's answer was invalid.
    Gone,
    /// The file has been detached.
    Detached,
}

impl From<EndCause> for Error {
    fn from(ended: EndCause) -> Self {
        match ended {
            EndCause::Revoked => EKEYREVOKED,
            EndCause::Gone => ESTALE,
            EndCause::Detached => ENOTCONN,
        }
    }
}

/// Contents of a view at one generation.
#[derive(Clone)]
pub(crate) struct Contents {
    pub(crate) generation: u64,
    pub(crate) rights: u32,
    pub(crate) uuid: [u8; 16],
    /// The target's instance, 0 where it is not known.
    pub(crate) instance: u64,
    pub(crate) window: Result<Arc<Window>, EndCause>,
}

impl Contents {
    /// `STATE_*` of the ABI; 0 for a view that was detached.
    pub(crate) fn state(&self) -> u32 {
        match self.window {
            Ok(_) => STATE_OPEN,
            Err(EndCause::Revoked) => STATE_REVOKED,
            Err(EndCause::Gone) => STATE_GONE,
            Err(EndCause::Detached) => 0,
        }
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.rights & RIGHT_WRITE != 0
    }
}

struct Now {
    contents: Contents,
    /// The generation that the tool knows of.
    seen: u64,
}

/// A view of a target.
#[pin_data]
pub(crate) struct View {
    // First, so that it is dropped first: the window is the host's no more when it is unmapped.
    host: Attachment,
    number: usize,
    is_read_only: bool,
    pages: AddressSpace,
    waiters: Arc<PollCondVarBox>,
    pub(crate) faults: Faults,
    pub(crate) read_bytes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) events: Counter,
    /// Whether the host's interrupt says when to look for changes. Set once, by [`crate::watch`].
    pub(crate) has_interrupt: Atomic<bool>,
    /// One change at a time.
    #[pin]
    changing: Mutex<()>,
    #[pin]
    now: Mutex<Now>,
    #[pin]
    pub(crate) work: DelayedWork<View>,
}

impl View {
    /// Opens the view that `call` asks for. `EIO` for an impossible answer of the host,
    /// `EOPNOTSUPP` where it offers no views.
    pub(crate) fn open(
        mut call: AttachCall,
        flags: u32,
        pages: AddressSpace,
        waiters: Arc<PollCondVarBox>,
    ) -> Result<Arc<Self>> {
        let is_read_only = flags & ATTACH_READ_ONLY != 0;
        // Before the token is used: without memory it stays good.
        let room = UniqueArc::new_uninit(GFP_KERNEL_ACCOUNT)?;
        let host = match hypercall::transport() {
            Transport::Windows => Attachment::open(&mut call, flags)?,
            Transport::Devices => Attachment::take(&call)?,
            Transport::None => return Err(EOPNOTSUPP),
        };
        let contents =
            match settled(&host).and_then(|snapshot| show(&host, &snapshot, is_read_only)) {
                Ok(contents) => contents,
                Err(error) => {
                    if matches!(error, EAGAIN | ENOMEM) {
                        host.put_back();
                    }
                    return Err(error);
                }
            };
        if let Err(ended) = contents.window {
            return Err(ended.into());
        }
        host.followed(contents.generation);
        let view = try_pin_init!(Self {
            host,
            number: NEXT_NUMBER.fetch_add(1, Relaxed).unsigned_abs() as usize,
            is_read_only,
            pages,
            waiters,
            faults: Faults::new(),
            read_bytes: Counter::new(),
            written_bytes: Counter::new(),
            events: Counter::new(),
            has_interrupt: Atomic::new(false),
            changing <- new_mutex!((), "kvmmem_changing"),
            now <- new_mutex!(Now { seen: contents.generation, contents }, "kvmmem_view"),
            work <- new_delayed_work!("kvmmem_watch"),
        });
        Ok(room.pin_init_with(view)?.into())
    }

    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// The view as the host knows it.
    pub(crate) fn host(&self) -> &Attachment {
        &self.host
    }

    /// What it shows, as far as is known.
    pub(crate) fn contents(&self) -> Contents {
        self.now.lock().contents.clone()
    }

    /// What it shows at this moment: looks whether the host has changed it. What was shown before,
    /// where that cannot be followed now.
    pub(crate) fn look(&self) -> Contents {
        let _ = self.refresh();
        self.contents()
    }

    /// Whether what was read through this generation's window was the target's.
    pub(crate) fn is_current(&self, contents: &Contents) -> bool {
        // The host changes what is behind a window and the generation in one step, as its guest
        // sees it.
        self.host.generation() == Some(contents.generation)
    }

    /// What it shows, to a tool that thereby knows of all changes.
    pub(crate) fn take_event(&self) -> Contents {
        let _ = self.refresh();
        let mut now = self.now.lock();
        now.seen = now.contents.generation;
        now.contents.clone()
    }

    /// Whether there is a change that the tool has not asked for, and whether the view has ended.
    pub(crate) fn events(&self) -> (bool, bool) {
        let now = self.now.lock();
        (
            now.seen != now.contents.generation,
            now.contents.window.is_err(),
        )
    }

    /// Calls `use_it` with what is shown, and lets nothing change meanwhile.
    pub(crate) fn with<R>(&self, use_it: impl FnOnce(&Contents) -> R) -> R {
        use_it(&self.now.lock().contents)
    }

    /// Looks whether the host has changed the view, and follows: afterwards no process has a page
    /// that is not shown any more, and then those who wait are woken. `EAGAIN` while the host
    /// is changing it, `ENOMEM` where this machine has no memory to follow: what was shown is
    /// out of date then, and the next look tries again. Does not wait for the host.
    pub(crate) fn refresh(&self) -> Result {
        if self.with(|contents| contents.window.is_err() || self.is_current(contents)) {
            return Ok(());
        }
        let _one = self.changing.lock();
        let (is_followed, is_open, generation) = self.with(|contents| {
            (
                self.is_current(contents),
                contents.window.is_ok(),
                contents.generation,
            )
        });
        if is_followed || !is_open {
            return Ok(());
        }
        let next = match self.host.read().and_then(|snapshot| {
            if snapshot.descriptor.generation < generation {
                stats::lie("the generation went back");
                return Err(EIO);
            }
            show(&self.host, &snapshot, self.is_read_only)
        }) {
            Ok(next) => next,
            Err(error) if matches!(error, EAGAIN | ENOMEM) => return Err(error),
            // The host said what cannot be, or unplugged its devices.
            Err(_) => self.ended(generation.saturating_add(1), EndCause::Gone),
        };
        self.events.add_one();
        stats::EVENTS.add_one();
        self.replace(next);
        self.waiters.notify_all();
        Ok(())
    }

    /// The tool wants no more of it. Its pages go from every process.
    pub(crate) fn detach(&self) {
        let _one = self.changing.lock();
        let generation = self.with(|contents| contents.generation);
        self.replace(self.ended(generation, EndCause::Detached));
        self.waiters.notify_all();
    }

    fn ended(&self, generation: u64, how: EndCause) -> Contents {
        self.with(|contents| Contents {
            generation,
            rights: contents.rights,
            uuid: contents.uuid,
            instance: contents.instance,
            window: Err(how),
        })
    }

    /// Replaces the contents with `next`. On return the earlier contents are not used any more. The
    /// caller must not use them either.
    fn replace(&self, next: Contents) {
        let (generation, has_ended) = (next.generation, next.window.is_err());
        let before = {
            let mut now = self.now.lock();
            core::mem::replace(&mut now.contents, next)
        };
        // Faults use the new contents; earlier pages are zapped. Then the window is unmapped.
        if let Ok(window) = before.window {
            for range in window.ranges() {
                self.pages.zap(range.gpa, range.len);
            }
            let waiter = window.waiter();
            drop(window);
            waiter.wait();
        }
        if has_ended {
            self.host.let_go();
        } else {
            self.host.followed(generation);
        }
    }
}

/// The descriptor of a view that is being opened. `EAGAIN` if the host is still changing it after a
/// second.
fn settled(host: &Attachment) -> Result<Snapshot> {
    for _ in 0..TRIES {
        match host.read() {
            Err(EAGAIN) if !is_killed() => fsleep(PAUSE),
            result => return result,
        }
    }
    Err(EAGAIN)
}

fn show(host: &Attachment, snapshot: &Snapshot, is_read_only: bool) -> Result<Contents> {
    let descriptor = &snapshot.descriptor;
    let window = match descriptor.state {
        STATE_OPEN => Ok(Window::map(host, snapshot)?),
        STATE_REVOKED => Err(EndCause::Revoked),
        _ => Err(EndCause::Gone),
    };
    let rights = if is_read_only {
        descriptor.rights & !RIGHT_WRITE
    } else {
        descriptor.rights
    };
    let Descriptor {
        generation,
        uuid,
        instance,
        ..
    } = *descriptor;
    Ok(Contents {
        generation,
        rights,
        uuid,
        instance,
        window,
    })
}
