// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens a view: from a token to a window that the guest's driver has taken up.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_abi::descriptor::Descriptor;
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::native::{RIGHT_READ, RIGHT_WRITE, STATE_GONE, STATE_OPEN};
use kvmmem_kvmi::token::Token;
use kvmmem_proto::guest::MappedBy;
use kvmmem_proto::message::{Caller, Refusal};
use kvmmem_proto::scope::Rights;
use kvmmem_qemu::qmp::{Qmp, QmpError};
use kvmmem_qemu::windows::descriptor::{Complaint, Pages};
use kvmmem_qemu::windows::layout::{self, WindowLayoutError};
use kvmmem_qemu::windows::machine::{self, MachineError};
use kvmmem_qemu::windows::pci_slots::{PciSlot, PciSlots};
use kvmmem_qemu::windows::plug::{self, PlugRequest};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::handle::{Introspector, State};
use super::inbox::Notice;
use super::view::{AttachAnswer, Phase, View};
use crate::calls::mint::random_token;
use crate::core::call_error::CallError;
use crate::reactor::{self, Reactor};
use crate::sync::lock;

/// How long the guest's driver may take to take up a view.
const SEEN_LIMIT: Duration = Duration::from_secs(5);

/// How soon the descriptor is looked at again: as long as a quick guest takes, and later.
const LOOK: [(Duration, Duration); 2] = [
    (Duration::from_millis(500), Duration::from_micros(500)),
    (SEEN_LIMIT, Duration::from_millis(5)),
];

/// How long a caller waits for a view of its own to be unplugged. The introspector's thread goes on
/// where that takes longer.
const UNPLUG_LIMIT: Duration = Duration::from_millis(1500);

/// A view that the guest's driver shows. Dropping it closes it, which may take some seconds where
/// the guest is slow.
#[derive(Debug)]
pub struct OpenView {
    introspector: Arc<Introspector>,
    view: Arc<View>,
    ticket: Token,
    mapped_by: MappedBy,
}

/// Why there is no view.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The token opens nothing.
    #[error("the token opens no view: {message}")]
    Token {
        /// Which kind of refusal.
        refusal: Refusal,
        /// The broker's words.
        message: String,
    },
    /// Its tools may not do without the module.
    #[error(
        "this introspector's tools need the module kvmmem in its guest (modprobe kvmmem); without the module, root in the \
         guest can keep what it has mapped and see later views as well, so the operator must trust the VM as a whole: \
         kvmmem introspector add --trusted on the host"
    )]
    Untrusted,
    /// No token was made for a view that is opened for tokens.
    #[error("no token can be made for the view: {0:?}")]
    Mint(KvmError),
    /// The introspector is being taken out.
    #[error("this VM is no longer an introspector")]
    Closed,
    /// QEMU does not say which slots there are.
    #[error("cannot find a PCI slot for the view")]
    Ask(#[from] MachineError),
    /// The view needs more slots than are free.
    #[error(
        "the view needs {needed} PCI slots of the introspector, and {free} of {count} are free{}; close other views, or start its QEMU with more root ports (kvmmem qemu-args --views)",
        retired_words(retired)
    )]
    NoPlace {
        /// How many it needs.
        needed: usize,
        /// How many there are that nothing is in.
        free: usize,
        /// How many there are.
        count: usize,
        /// Buses that are not used before the introspector is reset.
        retired: Vec<String>,
    },
    /// What is granted cannot be shown.
    #[error("this grant cannot be shown as PCI devices")]
    WindowLayout(#[from] WindowLayoutError),
    /// There is no memory for the descriptor.
    #[error("cannot make the view's descriptor")]
    Descriptor(#[source] Errno),
    /// There are no random bytes for the view's ticket.
    #[error("the system has no random bytes")]
    Ticket,
    /// QEMU did not plug it in.
    #[error("cannot plug the view into the introspector")]
    Plug(#[from] QmpError),
    /// The guest's driver cannot show it.
    #[error("the introspector's guest cannot show the view")]
    Complaint(#[from] Complaint),
    /// The guest's driver does not take it up.
    #[error(
        "the introspector's guest did not take up the view's devices within {} s; is the module kvmmem loaded there, and does it see PCI devices come?",
        SEEN_LIMIT.as_secs()
    )]
    Silent,
    /// It was revoked, or its target has gone, while it was opened.
    #[error("the view ended while it was opened")]
    Ended,
}

impl From<OpenError> for CallError {
    fn from(error: OpenError) -> Self {
        let refusal = match &error {
            OpenError::Token { refusal, .. } => *refusal,
            OpenError::Ended => Refusal::Unknown,
            OpenError::Untrusted
            | OpenError::Mint(_)
            | OpenError::Closed
            | OpenError::WindowLayout(_) => Refusal::Denied,
            OpenError::NoPlace { .. } | OpenError::Descriptor(_) | OpenError::Ticket => {
                Refusal::Limit
            }
            OpenError::Ask(_)
            | OpenError::Plug(_)
            | OpenError::Complaint(_)
            | OpenError::Silent => Refusal::Busy,
        };
        Self::from_error(refusal, &error)
    }
}

impl Introspector {
    /// Uses a token to open a view, on behalf of a process of the guest. Returns when the guest's
    /// module shows it, or when its devices are plugged in for a library.
    ///
    /// # Errors
    /// [`OpenError`]; what was plugged in is being unplugged then.
    pub fn open(
        self: &Arc<Self>,
        token: &Token,
        caller: &Caller,
        read_only: bool,
        mapped_by: MappedBy,
    ) -> Result<OpenView, OpenError> {
        if mapped_by == MappedBy::Library && !self.traits.trust.is_trusted {
            return Err(OpenError::Untrusted);
        }
        let (view, ticket) = self.plug(token, caller, read_only, (mapped_by, 0))?;
        Ok(OpenView { introspector: Arc::clone(self), view, ticket, mapped_by })
    }

    /// The same for a view with `FLAG_*`; the caller ends it.
    pub(super) fn plug(
        &self,
        token: &Token,
        caller: &Caller,
        read_only: bool,
        (mapped_by, flags): (MappedBy, u32),
    ) -> Result<(Arc<View>, Token), OpenError> {
        let mut qmp = self.monitor.lend().map_err(MachineError::from)?;
        // Before the token is used: there is at least one slot.
        let slots = machine::slots(&mut qmp)?;
        self.free(&lock(&self.state), &slots, 1)?;
        // What QEMU has reported by now concerns views that were there before.
        let since = self.monitor.counts();
        self.withdraw_token(token);
        let attached = self.link.attach(token, caller, read_only);
        let attached = attached
            .map_err(|CallError { refusal, message }| OpenError::Token { refusal, message })?;
        let view = Arc::new(View::new(&attached, since));
        lock(&self.state).views.push(Arc::clone(&view));
        let shown = self.show((&view, mapped_by), &attached, flags, &slots, &mut qmp);
        let is_open = view.opened(shown.is_ok());
        let error = match shown {
            Ok(ticket) if is_open => return Ok((view, ticket)),
            Ok(_) => OpenError::Ended,
            Err(error) => error,
        };
        view.announce(view.end().unwrap_or(STATE_GONE));
        self.inbox.put(Notice::Undo(Arc::clone(&view)));
        view.wait_settled(Instant::now() + UNPLUG_LIMIT);
        Err(error)
    }

    fn show(
        &self,
        (view, mapped_by): (&Arc<View>, MappedBy),
        attached: &AttachAnswer,
        flags: u32,
        slots: &PciSlots,
        qmp: &mut Qmp,
    ) -> Result<Token, OpenError> {
        if lock(&self.state).is_closed {
            return Err(OpenError::Closed);
        }
        // An event that came before the view was listed has found nothing.
        let target = self.link.target_of(view.number).ok_or(OpenError::Ended)?;
        let ram = target.ram().ok_or(OpenError::Ended)?;
        let now = || self.link.target_of(view.number).map(|_| ram.layout());
        let memory = view.show(now).ok_or(OpenError::Ended)?;
        let files = ram.files();
        let file = |number: u32| files.get(usize::try_from(number).ok()?).copied();
        let scope = &attached.scope;
        let has_offset = self.traits.has_offset;
        let regions = scope.regions(&memory.map);
        let layout = layout::cut(&regions, scope.spans.is_none(), has_offset, |number| {
            layout::shape(file(number)?)
        })?;
        let needed = plug::slots_of(layout.windows.len());
        let mine = self.reserve(view, slots, needed)?;
        let is_read_only = scope.rights == Rights::ReadOnly;
        // The driver tells views apart by this alone, and a grant's token may open several.
        let ticket = random_token().map_err(|_| OpenError::Ticket)?;
        let descriptor = Descriptor {
            state: STATE_OPEN,
            rights: if is_read_only { RIGHT_READ } else { RIGHT_READ | RIGHT_WRITE },
            token_digest: Sha256::digest(*Zeroizing::new(ticket.to_bytes())).into(),
            uuid: target.identity().uuid.into_bytes(),
            instance: memory.generation,
            flags,
            ..Descriptor::default()
        };
        let pages = Pages::new(descriptor, layout.ranges, needed).map_err(OpenError::Descriptor)?;
        let page_files = pages.files().to_vec();
        *lock(&view.pages) = Some(pages);
        let used: BTreeSet<u32> = layout.windows.iter().map(|window| window.file).collect();
        let shown = PlugRequest {
            name: format!("{}-{}", self.traits.session, view.number),
            slots: &mine,
            pages: page_files.iter().map(|file| file.as_fd()).collect(),
            files: used.iter().filter_map(|number| Some((*number, file(*number)?))).collect(),
            windows: &layout.windows,
            is_read_only,
            has_offset,
            is_marked: mapped_by == MappedBy::Library,
        };
        plug::plug_in(&view.plug, qmp, &shown, || view.end().is_none())?;
        if mapped_by == MappedBy::Module {
            wait_seen(view)?;
        }
        Ok(ticket)
    }

    /// The slots that are empty, not reserved and not retired, if they are enough.
    pub(super) fn free(
        &self,
        state: &State,
        slots: &PciSlots,
        needed: usize,
    ) -> Result<Vec<PciSlot>, OpenError> {
        let reserved: BTreeSet<PciSlot> =
            state.views.iter().flat_map(|view| lock(&view.slots).clone()).collect();
        let free = slots.free.difference(&reserved).filter(|slot| !state.retired.has(slot));
        let free: Vec<PciSlot> = free.cloned().collect();
        if free.len() < needed {
            let retired = state.retired.buses();
            let (free, count) = (free.len(), slots.count);
            return Err(OpenError::NoPlace { needed, free, count, retired });
        }
        Ok(free)
    }

    fn reserve(
        &self,
        view: &View,
        slots: &PciSlots,
        needed: usize,
    ) -> Result<Vec<PciSlot>, OpenError> {
        let state = lock(&self.state);
        let mut mine = self.free(&state, slots, needed)?;
        mine.truncate(needed);
        lock(&view.slots).extend(mine.iter().cloned());
        Ok(mine)
    }
}

impl OpenView {
    /// The broker's number for the view.
    pub(crate) fn view(&self) -> u64 {
        self.view.number
    }

    /// The token by which the guest's driver gives the view to a process; good for this view alone.
    pub fn ticket(&self) -> &Token {
        &self.ticket
    }

    /// Records that the tool has closed its connection. A library closes it when nothing of the
    /// view is mapped any more, and the kernel of a process that ends unmaps its memory before it
    /// closes its files: so this acknowledges the view's end.
    pub fn tool_has_closed(&self) {
        if self.mapped_by == MappedBy::Library {
            self.view.acknowledge_end();
        }
    }

    /// Whether the view has ended, or is about to: its grant was revoked, its target is gone, or
    /// its guest has been reset.
    pub fn ended(&self) -> bool {
        self.view.end().is_some() || self.view.phase() != Phase::Open
    }

    /// Has the reactor call the handler of `token` once the view has ended.
    pub(crate) fn wake_at_end(&self, reactor: &Reactor, token: reactor::Token) {
        self.view.wake_at_end(reactor, token);
    }
}

impl Drop for OpenView {
    fn drop(&mut self) {
        // Else it has ended, and is being unplugged.
        if self.view.claim(STATE_GONE) {
            self.view.announce(STATE_GONE);
            self.introspector.inbox.put(Notice::Closed(Arc::clone(&self.view)));
        }
        if !lock(&self.introspector.state).is_ended {
            self.view.wait_settled(Instant::now() + UNPLUG_LIMIT);
        }
    }
}

/// What is said of retired buses, if there are any.
fn retired_words(buses: &[String]) -> String {
    match buses {
        [] => String::new(),
        buses => format!(
            " ({} retired until the introspector is reset: a tool did not acknowledge the end of its view)",
            buses.join(", ")
        ),
    }
}

fn wait_seen(view: &View) -> Result<(), OpenError> {
    let began = Instant::now();
    loop {
        if view.end().is_some() {
            return Err(OpenError::Ended);
        }
        let (is_seen, complaint) = match &*lock(&view.pages) {
            Some(pages) => (pages.is_seen(), pages.complaint()),
            None => (false, None),
        };
        if let Some(complaint) = complaint {
            return Err(complaint.into());
        }
        if is_seen {
            return Ok(());
        }
        let elapsed = began.elapsed();
        let Some((_, pause)) = LOOK.iter().find(|(until, _)| elapsed < *until) else {
            return Err(OpenError::Silent);
        };
        std::thread::sleep(*pause);
    }
}
