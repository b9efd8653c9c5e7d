// SPDX-License-Identifier: GPL-2.0-only
//! Contents of a view: what it shows at one generation, or why it shows nothing.
//!
//! [`crate::view`] replaces them when the host changes the view. They are not changed themselves.

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{Arc, UniqueArc};
use kernel::time::delay::fsleep;
use kernel::time::Delta;

use crate::abi::descriptor::Descriptor;
use crate::abi::native::{ATTACH_READ_ONLY, RIGHT_WRITE, STATE_GONE, STATE_OPEN, STATE_REVOKED};
use crate::attachment::{AttachCall, Attachment};
use crate::snapshot::Snapshot;
use crate::stats::{self, Counter, Faults};
use crate::sys::task::is_killed;
use crate::window::Window;

/// The number of the session that is opened next. Areas of memory carry it, so that those of an
/// earlier session of the same file are told apart.
static NEXT_NUMBER: Atomic<i64> = Atomic::new(1);

/// How often, and at which interval, a system call looks again while the host is changing the view.
pub(crate) const TRIES: u32 = 1000;
pub(crate) const PAUSE: Delta = Delta::from_millis(1);

/// Why a view shows nothing.
#[derive(Clone, Copy)]
pub(crate) enum EndCause {
    /// The grant was revoked.
    Revoked,
    /// The target has exited, or the host's answer was invalid.
    Gone,
    /// The file is not attached.
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

/// One ATTACH of a file, until its DETACH.
pub(crate) struct Session {
    pub(crate) number: usize,
    pub(crate) host: Attachment,
    is_read_only: bool,
    pub(crate) faults: Faults,
    pub(crate) read_bytes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) events: Counter,
}

impl Drop for Session {
    fn drop(&mut self) {
        stats::VIEWS.subtract_one();
    }
}

/// Contents of a view at one generation.
pub(crate) struct Contents {
    pub(crate) descriptor: Descriptor,
    pub(crate) window: Result<Window, EndCause>,
    // After the window: nothing maps it any more when the host closes the view.
    session: Option<Arc<Session>>,
}

impl Contents {
    /// Those of a file that is not attached.
    pub(crate) fn none() -> Self {
        Self {
            descriptor: Descriptor::default(),
            window: Err(EndCause::Detached),
            session: None,
        }
    }

    /// Opens the view that `call` asks for. `EIO` for an impossible answer of the host,
    /// `EOPNOTSUPP` where it offers no views.
    pub(crate) fn open(call: AttachCall, flags: u32) -> Result<KBox<Self>> {
        Self::of(|| Attachment::open(call, flags), flags)
    }

    /// Those of the view that `attach` opens; else as [`Self::open`].
    pub(crate) fn of(
        attach: impl FnOnce() -> Result<Attachment>,
        flags: u32,
    ) -> Result<KBox<Self>> {
        // Before the token is used: without memory it stays good.
        let room = KBox::new_uninit(GFP_KERNEL_ACCOUNT)?;
        let session = UniqueArc::new_uninit(GFP_KERNEL_ACCOUNT)?;
        let host = attach()?;
        let is_read_only = flags & ATTACH_READ_ONLY != 0;
        let shown = match settled(&host).and_then(|snapshot| show(&host, &snapshot)) {
            Ok(shown) => shown,
            Err(error) => {
                if matches!(error, EAGAIN | ENOMEM) {
                    host.put_back();
                }
                return Err(error);
            }
        };
        stats::VIEWS.add_one();
        let session: Arc<Session> = session
            .write(Session {
                number: NEXT_NUMBER.fetch_add(1, Relaxed).unsigned_abs() as usize,
                host,
                is_read_only,
                faults: Faults::new(),
                read_bytes: Counter::new(),
                written_bytes: Counter::new(),
                events: Counter::new(),
            })
            .into();
        let opened = Self::new(session, shown);
        opened.window()?;
        Ok(KBox::write(room, opened))
    }

    fn new(session: Arc<Session>, shown: Shown) -> Self {
        let (mut descriptor, window) = shown;
        if session.is_read_only {
            descriptor.rights &= !RIGHT_WRITE;
        }
        Self {
            descriptor,
            window,
            session: Some(session),
        }
    }

    /// What the host shows now, in place of these. `EAGAIN` and `ENOMEM` as [`Attachment::read`]
    /// has them; any other failure ends the view.
    pub(crate) fn next(&self) -> Result<Self> {
        let session = self.session()?;
        let generation = self.descriptor.generation;
        let next = session.host.read().and_then(|snapshot| {
            if snapshot.descriptor.generation < generation {
                stats::lie("the generation went back");
                return Err(EIO);
            }
            show(&session.host, &snapshot)
        });
        match next {
            Err(error) if !matches!(error, EAGAIN | ENOMEM) => Ok(Self {
                descriptor: Descriptor {
                    generation: generation.saturating_add(1),
                    state: STATE_GONE,
                    ..self.descriptor
                },
                window: Err(EndCause::Gone),
                session: Some(session.clone()),
            }),
            next => next.map(|shown| Self::new(session.clone(), shown)),
        }
    }

    /// `ENOTCONN` where the file is not attached.
    pub(crate) fn session(&self) -> Result<&Arc<Session>> {
        self.session.as_ref().ok_or(ENOTCONN)
    }

    pub(crate) fn window(&self) -> Result<&Window> {
        self.window.as_ref().map_err(|ended| (*ended).into())
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.descriptor.rights & RIGHT_WRITE != 0
    }

    /// Whether what was read through the window until now was the target's.
    pub(crate) fn is_current(&self) -> bool {
        // The host changes what is behind a window and the generation in one step, as its guest
        // sees it.
        self.session
            .as_ref()
            .is_some_and(|session| session.host.generation() == Some(self.descriptor.generation))
    }

    /// Whether the host has changed the view. One that has ended does not change.
    pub(crate) fn is_outdated(&self) -> bool {
        self.window.is_ok() && !self.is_current()
    }
}

type Shown = (Descriptor, Result<Window, EndCause>);

fn show(host: &Attachment, snapshot: &Snapshot) -> Result<Shown> {
    let window = match snapshot.descriptor.state {
        STATE_OPEN => Ok(Window::map(host, snapshot)?),
        STATE_REVOKED => Err(EndCause::Revoked),
        _ => Err(EndCause::Gone),
    };
    Ok((snapshot.descriptor, window))
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
