// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Operators' connection to the broker: targets, introspectors, grants, hooks and pauses. The
//! command line uses it.

use std::path::Path;
use std::time::Duration;

pub use kvmmem_kvmi::token::Token;
use kvmmem_proto::client::{self, ClientError};
use kvmmem_proto::endpoint::Endpoint;
pub use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Answer, Call, Cursor, Request};
pub use kvmmem_proto::message::{
    Evidence, GrantInfo, GrantRequest, GrantState, HookInfo, IntrospectorRequest, KvmiPolicy,
    NewGrant, NewIntrospector, NewTarget, OnSilence, Origin, RevokeReport, SegmentRegister,
    TargetInfo, VcpuRegisters, ViewCounters, ViewInfo, VmIdentity, Which,
};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket};
pub use kvmmem_proto::scope::{Rights, Scope, Span};

/// No VM has more vCPUs.
const MAX_VCPUS: usize = 4096;

/// A connection to the broker that registers nothing. The broker closes it after 10 s of silence.
///
/// Where the broker refuses, the message of [`ClientError::Refused`] says why and what to do.
pub struct Admin {
    socket: PacketSocket,
    buffer: PacketBuffer,
    last_request: u64,
}

/// PCI slots of an introspector for views.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeSlots {
    /// How many are free.
    pub free: u32,
    /// How many there are.
    pub count: u32,
    /// Buses whose slots are not used until the introspector is reset: a tool without the module
    /// did not acknowledge the end of its view.
    pub retired: Vec<String>,
}

impl Admin {
    /// Connects to the broker that listens at `path`.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let socket = client::connect(path)?;
        Ok(Self { socket, buffer: PacketBuffer::default(), last_request: 0 })
    }

    /// Waits this long for each answer from now on, in place of 5 s.
    ///
    /// # Errors
    /// [`ClientError::Packet`] where the system refuses.
    pub fn limit_answers(&mut self, limit: Duration) -> Result<(), ClientError> {
        Ok(self.socket.limit_receive(Some(limit))?)
    }

    /// The registered VMs.
    pub fn targets(&mut self) -> Result<Vec<TargetInfo>, ClientError> {
        let mut all: Vec<TargetInfo> = Vec::new();
        loop {
            let after = all.last().map_or(0, |target| target.id);
            let Answer::Targets { targets, more } = self.ask(Call::Targets { after })? else {
                return Err(ClientError::NoAnswer);
            };
            let empty = targets.is_empty();
            all.extend(targets);
            if !more || empty {
                return Ok(all);
            }
        }
    }

    /// Connects a target, given by name or UUID, to a tool that listens for KVMI at `endpoint`, now
    /// and whenever the connection ends.
    pub fn hook(&mut self, target: &str, endpoint: &Endpoint) -> Result<(), ClientError> {
        let call = Call::Hook { target: target.to_owned(), endpoint: endpoint.clone() };
        self.ask(call).map(|_| ())
    }

    /// Undoes a hook and ends its connection.
    pub fn unhook(&mut self, target: &str, endpoint: &Endpoint) -> Result<(), ClientError> {
        let call = Call::Unhook { target: target.to_owned(), endpoint: endpoint.clone() };
        self.ask(call).map(|_| ())
    }

    /// Makes a token.
    ///
    /// # Errors
    /// [`ClientError`]; where a range is refused, the message names it.
    pub fn grant(&mut self, request: &GrantRequest) -> Result<NewGrant, ClientError> {
        match self.ask(Call::Grant(request.clone()))? {
            Answer::Granted(grant) => Ok(grant),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// The grants, by ascending number: those that can be used, those that have open views, and for
    /// a while those whose end was not long ago.
    pub fn grants(&mut self) -> Result<Vec<GrantInfo>, ClientError> {
        let mut all: Vec<GrantInfo> = Vec::new();
        let mut after = Cursor::default();
        loop {
            let Answer::Grants { grants, next } = self.ask(Call::Grants { after })? else {
                return Err(ClientError::NoAnswer);
            };
            for grant in grants {
                // The rest of a grant whose views did not fit in one page.
                match all.last_mut().filter(|last| last.id == grant.id) {
                    Some(last) => last.views.extend(grant.views),
                    None => all.push(grant),
                }
            }
            match next {
                Some(next) if next > after => after = next,
                Some(_) => return Err(ClientError::NoAnswer),
                None => return Ok(all),
            }
        }
    }

    /// Revokes a grant: it opens no new view, and its open views close. Waits, at most 2 s, until
    /// all peers that use it have confirmed. May be repeated.
    pub fn revoke(&mut self, grant: u64) -> Result<RevokeReport, ClientError> {
        match self.ask(Call::Revoke { grant })? {
            Answer::Revoked(report) => Ok(report),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// What tokens allow from now on that KVMI makes for a target, given by name or UUID; sets it
    /// first if asked to. By its UUID a target need not be registered yet.
    pub fn policy(
        &mut self,
        target: &str,
        set: Option<KvmiPolicy>,
    ) -> Result<KvmiPolicy, ClientError> {
        match self.ask(Call::Policy { target: target.to_owned(), set })? {
            Answer::Policy { policy } => Ok(policy),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// Attaches a VM that runs under a stock VMM, and registers it. Only root may.
    ///
    /// # Errors
    /// [`ClientError`]; the message says what to do where it can be helped.
    pub fn add_target(
        &mut self,
        which: &Which,
        name: Option<&str>,
    ) -> Result<NewTarget, ClientError> {
        let call = Call::AddTarget { which: which.clone(), name: name.map(str::to_owned) };
        match self.ask(call)? {
            Answer::Added(target) => Ok(target),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// Removes a VM that was added, given by name or UUID; the VM itself runs on. Only root may.
    pub fn remove_target(&mut self, target: &str) -> Result<(), ClientError> {
        self.ask(Call::RemoveTarget { target: target.to_owned() }).map(|_| ())
    }

    /// Makes an introspector of a VM that runs under a stock QEMU. Only root may.
    ///
    /// # Errors
    /// [`ClientError`]; the message says what to do where it can be helped.
    pub fn add_introspector(
        &mut self,
        request: &IntrospectorRequest,
    ) -> Result<NewIntrospector, ClientError> {
        match self.ask(Call::AddIntrospector(request.clone()))? {
            Answer::IntrospectorAdded(introspector) => Ok(introspector),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// Removes an introspector that was added, given by name or UUID: its views end, the VM
    /// itself runs on. Only root may.
    pub fn remove_introspector(&mut self, name: &str) -> Result<(), ClientError> {
        self.ask(Call::RemoveIntrospector { name: name.to_owned() }).map(|_| ())
    }

    /// The PCI slots that an introspector that was added, given by name or UUID, has for views.
    ///
    /// # Errors
    /// [`ClientError`]; `Refusal::Denied` for one that was not added.
    pub fn free_slots(&mut self, introspector: &str) -> Result<FreeSlots, ClientError> {
        match self.ask(Call::FreeSlots { introspector: introspector.to_owned() })? {
            Answer::FreeSlots { free, count, retired } => Ok(FreeSlots { free, count, retired }),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// The registers of a target's vCPUs, in the order of their numbers. Of a VM that runs, each is
    /// of another moment.
    ///
    /// # Errors
    /// [`ClientError`]; `Refusal::Unsupported` where the VMM cannot be asked.
    pub fn registers(&mut self, target: &str) -> Result<Vec<VcpuRegisters>, ClientError> {
        let mut all: Vec<VcpuRegisters> = Vec::new();
        loop {
            let first = u32::try_from(all.len()).map_err(|_| ClientError::NoAnswer)?;
            let Answer::Registers { vcpus, more } =
                self.ask(Call::Registers { target: target.to_owned(), first })?
            else {
                return Err(ClientError::NoAnswer);
            };
            let is_empty = vcpus.is_empty();
            all.extend(vcpus);
            if !more || is_empty || all.len() >= MAX_VCPUS {
                return Ok(all);
            }
        }
    }

    /// Stops a target's vCPUs, and returns whether they ran. They run again after
    /// [`Admin::resume`], and when this connection ends or sends nothing for 10 s: so this is
    /// to be called again before that. It then fails if they have run meanwhile. A target that
    /// did not run stays as it is.
    ///
    /// # Errors
    /// [`ClientError`]; `Refusal::Unsupported` where the VMM cannot be asked.
    pub fn pause(&mut self, target: &str) -> Result<bool, ClientError> {
        match self.ask(Call::Pause { target: target.to_owned() })? {
            Answer::Paused { was_running } => Ok(was_running),
            _ => Err(ClientError::NoAnswer),
        }
    }

    /// Ends this connection's pause of a target.
    ///
    /// # Errors
    /// [`ClientError`], where it had ended before as well.
    pub fn resume(&mut self, target: &str) -> Result<(), ClientError> {
        self.ask(Call::Resume { target: target.to_owned() }).map(|_| ())
    }

    fn ask(&mut self, call: Call) -> Result<Answer, ClientError> {
        self.last_request += 1;
        let request = Request { id: self.last_request, call };
        // An answer that comes too late for an earlier request is dropped.
        let (answer, _) = client::ask(&self.socket, &mut self.buffer, &request, &[], |_| {})?;
        Ok(answer)
    }
}
