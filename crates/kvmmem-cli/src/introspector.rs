// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs that look at others: `introspector list`, and for those under a stock QEMU `introspector
//! add` and `introspector remove`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use kvmmem_client::admin::{self, Admin, FreeSlots, NewIntrospector, TargetInfo};
use serde::Serialize;

use crate::broker::Broker;
use crate::escape::escape;
use crate::number::{count, integer};
use crate::output::Output;
use crate::registered;
use crate::target::RunningVm;

#[derive(Args)]
pub(crate) struct Introspector {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the introspectors, and how many views each can still open.
    List {
        #[command(flatten)]
        broker: Broker,
    },
    /// Let a running virtual machine under QEMU look at targets (root only).
    ///
    /// It must have been started with what `kvmmem qemu-args` prints: PCI slots for views, a vsock
    /// device, and a QMP socket for the broker alone. Its guest needs the module kvmmem, unless it
    /// is --trusted. With --pid alone the QMP socket comes from its command line; with --libvirt
    /// the socket beside libvirt's is used.
    Add(Add),
    /// Remove an introspector: its views close, and the virtual machine keeps running (root only).
    Remove(Remove),
}

#[derive(Args)]
struct Add {
    #[command(flatten)]
    running: RunningVm,
    /// Its vsock context id, if its QEMU's command line lacks it
    #[arg(long, value_parser = integer(3..=u32::MAX - 1))]
    cid: Option<u32>,
    /// What to do when a view is revoked and its guest does not release it
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    on_silence: OnSilence,
    /// Let its tools do without the module kvmmem: each process that is root in it may then see
    /// every view that this virtual machine ever gets
    #[arg(long)]
    trusted: bool,
    #[command(flatten)]
    broker: Broker,
}

/// As [`admin::OnSilence`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum OnSilence {
    /// Log it, report it to the caller of the revocation, and keep trying
    #[default]
    Report,
    /// Stop its processors, too (QMP stop; cont resumes them)
    Pause,
    /// End its QEMU, too
    Kill,
}

impl From<OnSilence> for admin::OnSilence {
    fn from(what: OnSilence) -> Self {
        match what {
            OnSilence::Report => Self::Report,
            OnSilence::Pause => Self::Pause,
            OnSilence::Kill => Self::Kill,
        }
    }
}

#[derive(Args)]
struct Remove {
    /// Name or UUID of the introspector
    introspector: String,
    #[command(flatten)]
    broker: Broker,
}

/// An introspector, as JSON.
#[derive(Serialize)]
struct ListedLine<'a> {
    #[serde(flatten)]
    introspector: &'a TargetInfo,
    /// `null` where QEMU does not report it, and for a VM of `kvmmem vm`, which has as many as it
    /// needs.
    slots: Option<Slots>,
}

/// PCI slots for views.
#[derive(Serialize)]
struct Slots {
    free: u32,
    count: u32,
    /// Buses that are not used before the introspector is reset.
    retired: Vec<String>,
}

/// What was added, as JSON.
#[derive(Serialize)]
struct AddedLine<'a> {
    introspector: &'a TargetInfo,
    slot_count: u32,
    has_offset: bool,
}

/// What was removed, as JSON.
#[derive(Serialize)]
struct RemovedLine<'a> {
    introspector: &'a str,
    removed: bool,
}

impl Introspector {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        match &self.verb {
            Verb::List { broker } => list(broker, output)?,
            Verb::Add(add) => add.run(output)?,
            Verb::Remove(remove) => remove.run(output)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(broker: &Broker, output: &mut Output) -> Result<()> {
    let mut admin = broker.connect()?;
    let mut vms = admin.targets().context("cannot list the introspectors")?;
    vms.retain(|vm| vm.identity.introspector);
    if vms.is_empty() && !output.is_json() {
        return Ok(output.line(
            "there are no introspectors: kvmmem introspector add makes one of a running VM",
        )?);
    }
    let slots: Vec<_> = vms.iter().map(|vm| slots(&mut admin, vm)).collect();
    if output.is_json() {
        for (introspector, slots) in vms.iter().zip(slots) {
            output.object(&ListedLine { introspector, slots })?;
        }
        return Ok(());
    }
    let cell = |slots: Option<Slots>| {
        slots.map_or_else(
            || "-".to_owned(),
            |Slots { free, count, retired }| match retired.as_slice() {
                [] => format!("{free} of {count}"),
                retired => {
                    format!("{free} of {count}, until a reset without {}", retired.join(" "))
                }
            },
        )
    };
    let lines = registered::lines_with("FREE SLOTS", &vms, slots.into_iter().map(cell));
    lines.into_iter().try_for_each(|line| Ok(output.line(line)?))
}

fn slots(admin: &mut Admin, vm: &TargetInfo) -> Option<Slots> {
    let FreeSlots { free, count, retired } =
        admin.free_slots(&vm.identity.uuid.to_string()).ok()?;
    Some(Slots { free, count, retired })
}

impl Add {
    fn run(&self, output: &mut Output) -> Result<()> {
        let request = admin::IntrospectorRequest {
            which: self.running.which()?,
            cid: self.cid,
            name: self.running.name.clone(),
            on_silence: self.on_silence.into(),
            trusted: self.trusted,
        };
        let added = self
            .broker
            .connect()?
            .add_introspector(&request)
            .context("cannot add the introspector")?;
        if output.is_json() {
            let NewIntrospector { target, slot_count, has_offset } = &added;
            let line = AddedLine {
                introspector: target,
                slot_count: *slot_count,
                has_offset: *has_offset,
            };
            return Ok(output.object(&line)?);
        }
        for line in lines(&added) {
            output.line(line)?;
        }
        Ok(())
    }
}

/// What was added, and what it cannot do.
fn lines(added: &NewIntrospector) -> Vec<String> {
    let NewIntrospector { target, slot_count, has_offset } = added;
    let cid = target.identity.cid.map_or_else(|| "-".to_owned(), |cid| cid.to_string());
    let mut lines = vec![format!(
        "{} ({}) is an introspector; context id {cid}",
        escape(&target.identity.name),
        target.identity.uuid
    )];
    lines.push(format!("  it has {} for views", count(*slot_count, "PCI slot")));
    if !has_offset {
        lines.push(
            "  its QEMU shows whole files only: a grant must be for all RAM, and that a power of two in one file"
                .to_owned(),
        );
    }
    lines
}

impl Remove {
    fn run(&self, output: &mut Output) -> Result<()> {
        let name = &self.introspector;
        self.broker
            .connect()?
            .remove_introspector(name)
            .with_context(|| format!("cannot remove {name:?}"))?;
        if output.is_json() {
            output.object(&RemovedLine { introspector: name, removed: true })?;
        } else {
            output.line(format!("{} is no longer an introspector", escape(name)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        introspector: Introspector,
    }

    #[test]
    fn one_way_to_say_which_is_enough() {
        let parse =
            |words: &str| Line::try_parse_from(["x", "add"].into_iter().chain(words.split(' ')));
        for good in [
            "--qmp /a",
            "--pid 3",
            "--libvirt x",
            "--qmp /a --pid 3 --cid 5 --on-silence kill --trusted",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "--qmp /a --libvirt x",
            "--libvirt x --pid 3",
            "--pid 3 --cid 2",
            "--pid 3 --on-silence no",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_it_lacks_is_said() {
        let target = TargetInfo { memory_bytes: 0, ..crate::registered::example("lion\x1b") };
        let mut added = NewIntrospector { target, slot_count: 2, has_offset: true };
        assert_eq!(
            lines(&added),
            [
                "lion\\u{1b} (00000000-0000-0000-0000-000000000000) is an introspector; context id 3",
                "  it has 2 PCI slots for views",
            ]
        );
        added.has_offset = false;
        let lines = lines(&added).join("\n");
        assert!(lines.contains("power of two"), "{lines}");
    }
}
