// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a verb gets a target's memory from: a view, by a token or by the target's name, or KVMI.
//! Verbs that only read have it from [`crate::input`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use clap::Args;
use kvmmem::Token;
use kvmmem::view::{Access, Range, View, ViewError, default_socket};
use kvmmem_client::ClientError;
use kvmmem_client::admin::{Admin, GrantRequest, Rights};
use zeroize::Zeroizing;

use crate::broker::NO_BROKER;
use crate::connect::Connect;
use crate::embedded::{Embedded, is_absent};
use crate::failure::usage;
use crate::memory::Memory;
use crate::range::GpaRange;
use crate::shell::quote;
use crate::target_name::TargetName;
use crate::token_file::{parse_token, read_token};

/// Environment variable with the token.
const TOKEN_VARIABLE: &str = "KVMMEM_TOKEN";

/// How long the token of a grant that a verb makes for itself can be used.
const OWN_GRANT_TTL: Duration = Duration::from_secs(10);

/// What to do where no token is given.
pub(crate) const NO_TOKEN: &str = "on the host, name the target (--target NAME); elsewhere, make a token on the host \
     (kvmmem grant create NAME) and give it here by --token-file or KVMMEM_TOKEN; for a hooked target, listen (--listen \
     vsock:PORT or unix:PATH, KVMMEM_KVMI_PORT)";

#[derive(Args, Default)]
pub(crate) struct Source {
    /// On the host: the target, by name or UUID, or as pid:N, qmp:SOCKET or libvirt:NAME. Needs no
    /// token: a grant for one use is made for this command. Where no broker runs, root needs
    /// none: this command adds the virtual machine for as long as it lasts
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["token", "token_file", "listen", "device"])]
    target: Option<TargetName>,

    /// The grant's token, 64 hexadecimal digits; other users of this machine can see it in the
    /// list of processes, so prefer --token-file or KVMMEM_TOKEN
    #[arg(long, value_name = "HEX", conflicts_with_all = ["token_file", "listen"])]
    token: Option<Token>,

    /// File with the token, or with all that `kvmmem grant create` printed; - is standard input
    /// [default: the token in KVMMEM_TOKEN, or else a KVMI session's]
    #[arg(long, value_name = "FILE", conflicts_with = "listen")]
    token_file: Option<PathBuf>,

    /// In a guest: the device to attach through [default: KVMMEM_DEVICE, or else /dev/kvmmem if
    /// there is one]
    #[arg(long, value_name = "PATH", conflicts_with = "broker")]
    device: Option<PathBuf>,

    /// On the host: socket of the broker [default: KVMMEM_BROKER, or else
    /// /run/kvmmem/kvmmemd.sock]
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,

    #[command(flatten)]
    connect: Connect,
}

impl Source {
    /// A target of this host.
    pub(crate) fn of_target(target: TargetName) -> Self {
        Self { target: Some(target), ..Self::default() }
    }

    /// Attaches a view for a verb that needs memory in each of `wanted`. The token is used up,
    /// except on the host where one of them has no memory.
    pub(crate) fn attach(&self, access: Access, verb: &str, wanted: &[GpaRange]) -> Result<View> {
        Ok(self.attach_asking(access, verb, wanted, false)?.0)
    }

    /// As [`Source::attach`]. Where the target is named, its broker can be asked more; `asks_vmm`
    /// is whether that is wanted which the broker has from the VMM.
    pub(crate) fn attach_asking(
        &self,
        access: Access,
        verb: &str,
        wanted: &[GpaRange],
        asks_vmm: bool,
    ) -> Result<(View, Option<Operator>)> {
        let wanted: Vec<Range> = wanted.iter().map(from_range).collect();
        if let Some(target) = &self.target {
            let attached = self.attach_by_name(target, access, verb, &wanted, asks_vmm);
            let (view, operator) = attached.map_err(|error| without_token(error, target))?;
            return Ok((view, Some(operator)));
        }
        Ok((self.attach_by_token(access, &wanted)?, None))
    }

    fn attach_by_token(&self, access: Access, wanted: &[Range]) -> Result<View> {
        let token = match self.token()? {
            Some(token) => token,
            None if !self.connect.is_possible() => {
                return Err(usage(format!("no token: {NO_TOKEN}")));
            }
            None => {
                self.connect.accept().and_then(|mut session| Ok(session.map_token()?)).context(
                    "no token was given (--token-file, KVMMEM_TOKEN), and none came over KVMI",
                )?
            }
        };
        Ok(match (&self.device, &self.broker) {
            (Some(device), _) => View::attach_device(device, &token, access)?,
            (None, Some(broker)) => View::attach_host_reaching(broker, &token, access, wanted)?,
            (None, None) => View::attach_reaching(&token, access, wanted)?,
        })
    }

    /// Attaches a view of a target of this host's broker, or, where no broker runs, of any virtual
    /// machine.
    fn attach_by_name(
        &self,
        target: &TargetName,
        access: Access,
        verb: &str,
        wanted: &[Range],
        asks_vmm: bool,
    ) -> Result<(View, Operator)> {
        let socket = self.broker.clone().unwrap_or_else(default_socket);
        let mut admin = match Admin::connect(&socket) {
            // A broker that is named is the one that is meant.
            Err(error) if self.broker.is_none() && is_absent(&error) => {
                let mut own = Embedded::start(&socket, target, asks_vmm)?;
                let name = own.target.to_string();
                let view =
                    grant_and_attach(&mut own.admin, &own.socket, &name, access, verb, wanted)?;
                return Ok((
                    view,
                    Operator { admin: own.admin, target: name, no_monitor: own.no_monitor },
                ));
            }
            admin => admin.context(NO_BROKER)?,
        };
        let name = match target {
            TargetName::Name(name) => name.clone(),
            _ => {
                let pid = target.pid();
                let targets = admin.targets().context("cannot list the virtual machines")?;
                let found =
                    targets.iter().find(|vm| vm.identity.introspectable && Some(vm.pid) == pid);
                let add = || match target {
                    TargetName::Qmp(path) => format!("kvmmem target add --qmp {}", quote(path)),
                    TargetName::Libvirt(name) => {
                        format!("kvmmem target add --libvirt {}", quote(name))
                    }
                    _ => "`kvmmem host discover` prints the command that adds it".to_owned(),
                };
                found
                    .with_context(|| format!("{target} is not a target of the broker; {}", add()))?
                    .identity
                    .uuid
                    .to_string()
            }
        };
        let view = grant_and_attach(&mut admin, &socket, &name, access, verb, wanted)?;
        Ok((view, Operator { admin, target: name, no_monitor: None }))
    }

    /// How errors name the target: a token names none.
    pub(crate) fn name(&self) -> String {
        self.target.as_ref().map_or_else(|| "the target".to_owned(), ToString::to_string)
    }

    /// As [`crate::input::Input::arguments`].
    pub(crate) fn arguments(&self) -> String {
        let target =
            self.target.as_ref().map(|target| format!(" --target {}", quote(target.argument())));
        target.unwrap_or_default()
    }

    /// Whether the command line or the environment names a source.
    pub(crate) fn is_given(&self) -> bool {
        self.target.is_some()
            || self.token.is_some()
            || self.token_file.is_some()
            || self.connect.is_possible()
            || std::env::var_os(TOKEN_VARIABLE).is_some()
    }

    /// Whether the target is named and no broker runs, so that this command is its own broker.
    pub(crate) fn has_no_broker(&self) -> bool {
        let is_absent = || Admin::connect(&default_socket()).is_err_and(|error| is_absent(&error));
        self.target.is_some() && self.broker.is_none() && is_absent()
    }

    /// Whether the target is named, so that this command makes its own grant.
    pub(crate) fn is_by_name(&self) -> bool {
        self.target.is_some()
    }

    /// Memory for a few accesses, some of them in each of `wanted`: over KVMI unless something of a
    /// view is given.
    pub(crate) fn memory(&self, access: Access, verb: &str, wanted: &[GpaRange]) -> Result<Memory> {
        let wants_view = self.target.is_some()
            || self.token.is_some()
            || self.token_file.is_some()
            || self.device.is_some()
            || self.broker.is_some()
            || !self.connect.is_given() && std::env::var_os(TOKEN_VARIABLE).is_some();
        Ok(if wants_view {
            Memory::View(self.attach(access, verb, wanted)?)
        } else if !self.connect.is_possible() {
            return Err(usage(format!("no token: {NO_TOKEN}")));
        } else {
            Memory::Session(self.connect.accept()?)
        })
    }

    /// The token that was given; `None` where KVMI is to give one.
    fn token(&self) -> Result<Option<Token>> {
        if let Some(token) = &self.token {
            return Ok(Some(token.clone()));
        }
        if let Some(path) = &self.token_file {
            return read_token(path)
                .map(Some)
                .with_context(|| format!("no token in {}", path.display()));
        }
        if self.connect.is_given() {
            return Ok(None);
        }
        let text = std::env::var(TOKEN_VARIABLE).ok().map(Zeroizing::new);
        let token = text.map(|text| parse_token(&text)).transpose();
        token.with_context(|| format!("{TOKEN_VARIABLE} holds no token"))
    }
}

/// The broker's error about the wanted ranges, in the words of a command without a token.
fn without_token(error: Error, target: &TargetName) -> Error {
    let Some(ViewError::AttachHost { source, .. }) = error.downcast_ref() else { return error };
    let ClientError::Refused { message, .. } = &**source else { return error };
    match message.strip_suffix("; the token was not used") {
        Some(message) => anyhow!(
            "{target}: {}",
            message.replace("memory that the token opens, which", "memory of it, which")
        ),
        None => error,
    }
}

/// Makes a grant for one use, which the audit log shows with the verb, and uses it at once. The
/// grant is spent then; if it cannot be used it is revoked.
fn grant_and_attach(
    admin: &mut Admin,
    socket: &Path,
    target: &str,
    access: Access,
    verb: &str,
    wanted: &[Range],
) -> Result<View> {
    let request = GrantRequest {
        target: target.to_owned(),
        spans: None,
        rights: match access {
            Access::ReadOnly => Rights::ReadOnly,
            Access::Granted => Rights::ReadWrite,
        },
        ttl_ms: u64::try_from(OWN_GRANT_TTL.as_millis())?,
        uses: 1,
        holder: None,
        label: Some(format!("kvmmem {verb}")),
    };
    let granted =
        admin.grant(&request).with_context(|| format!("cannot grant access to {target:?}"))?;
    View::attach_host_reaching(socket, &granted.token, access, wanted).map_err(|error| {
        // The view's error is the one to report; the token expires in any case.
        let _ = admin.revoke(granted.grant);
        error.into()
    })
}

/// The connection that made a view's grant, and the target's name there. The broker closes it after
/// 10 s of silence.
pub(crate) struct Operator {
    pub(crate) admin: Admin,
    pub(crate) target: String,
    /// Why this command, where no broker runs, has no connection to the target's monitor though
    /// one was wanted.
    pub(crate) no_monitor: Option<ClientError>,
}

impl Operator {
    /// Why the target's VMM does not answer, where that is what `error` is about.
    pub(crate) fn explain(&mut self, error: ClientError) -> anyhow::Error {
        self.no_monitor.take().unwrap_or(error).into()
    }
}

/// The ranges that a view reaches, ascending.
pub(crate) fn ranges(view: &View) -> Result<Vec<GpaRange>> {
    Ok(view.ranges()?.into_iter().map(to_range).collect())
}

/// The parts of `range` that hold data, one after the other. Only these are worth reading, and
/// reading another one could make the target's host provide memory for it.
pub(crate) fn data_within(view: &View, range: &GpaRange) -> impl Iterator<Item = Result<GpaRange>> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let part = match view.data_from(at) {
            Ok(part) => part.map(to_range)?,
            Err(error) => {
                at = end;
                return Some(Err(error.into()));
            }
        };
        let part = part.start.max(at)..part.end.min(end);
        at = part.end.max(at);
        (!part.is_empty()).then_some(Ok(part))
    })
}

fn to_range(range: Range) -> GpaRange {
    range.gpa..range.end()
}

fn from_range(range: &GpaRange) -> Range {
    Range { gpa: range.start, len: range.end - range.start }
}
