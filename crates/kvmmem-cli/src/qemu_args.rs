// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem qemu-args`: what a stock QEMU, or a domain of libvirt, needs to be an introspector.

mod libvirt;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::number::{integer, parse, size};
use crate::output::Output;

/// The chassis number of the first port; numbers that people and libvirt count from 1 stay below
/// it.
const FIRST_CHASSIS: u64 = 200;

/// The largest target that windows are made for: a larger one needs more guest-physical address
/// bits than PCs have.
const MAX_MEMORY: u64 = 16 << 40;

/// Windows up to so many bytes fit in 40 bits of guest-physical addresses beside the introspector's
/// own RAM.
const FITS_IN_40_BITS: u64 = 512 << 30;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Machine type of the introspector
    #[arg(long, value_enum, default_value_t = Machine::Q35)]
    machine: Machine,
    /// How many views there may be at a time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = integer(1..=16u64))]
    views: u64,
    /// RAM of the largest target, such as 8G
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_memory)]
    memory: u64,
    /// Vsock context id: no other virtual machine of the host has it
    #[arg(long, default_value_t = 3, value_parser = integer(3..=u32::MAX - 1))]
    cid: u32,
    /// Name of the introspector, for the QMP socket; with --libvirt, the domain's
    #[arg(long, default_value = "introspector", value_parser = parse_name)]
    name: String,
    /// Where QEMU makes the QMP socket for the broker [default: /run/NAME.qmp; with --libvirt,
    /// /var/lib/libvirt/qemu/NAME.monitor]
    #[arg(long, value_name = "SOCKET", value_parser = parse_socket)]
    qmp: Option<PathBuf>,
    /// Print what to add to libvirt's XML instead
    #[arg(long)]
    libvirt: bool,
}

/// Machine types of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Machine {
    /// PCI Express: a view takes a port, which must be there from the start
    Q35,
    /// i440FX: a view takes a free slot of the only bus
    Pc,
}

/// What is added to a virtual machine.
#[derive(Debug)]
struct Parts<'a> {
    machine: Machine,
    views: u64,
    /// Guest-physical addresses for one view's windows, bytes.
    reserve: u64,
    cid: u32,
    qmp: &'a Path,
}

/// The command line's part, as JSON.
#[derive(Serialize)]
struct ArgumentsLine<'a> {
    arguments: &'a [String],
}

/// The XML, as JSON.
#[derive(Serialize)]
struct XmlLine<'a> {
    xml: &'a str,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let default = if self.libvirt {
            format!("/var/lib/libvirt/qemu/{}.monitor", self.name)
        } else {
            format!("/run/{}.qmp", self.name)
        };
        let qmp = self.qmp.clone().unwrap_or_else(|| default.into());
        let Some(reserve) = reserve(self.memory) else { bail!("no windows are that large") };
        let parts =
            Parts { machine: self.machine, views: self.views, reserve, cid: self.cid, qmp: &qmp };
        if parts.total_reserve() > FITS_IN_40_BITS {
            tracing::warn!(
                "{} of windows need more guest-physical addresses than some virtual processors have: \
                 -cpu host,host-phys-bits=on (libvirt: <maxphysaddr mode='passthrough'/> within <cpu>)",
                size(parts.total_reserve())
            );
        }
        match (self.libvirt, output.is_json()) {
            (true, true) => output.object(&XmlLine { xml: &parts.xml() })?,
            (true, false) => output.styled(parts.xml())?,
            (false, true) => output.object(&ArgumentsLine { arguments: &parts.arguments() })?,
            (false, false) => {
                for pair in parts.arguments().chunks(2) {
                    output.line(pair.join(" "))?;
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Parts<'_> {
    /// Options and their values by turns.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        match self.machine {
            Machine::Q35 => {
                for number in 0..self.views {
                    let chassis = FIRST_CHASSIS + number;
                    let reserve = qemu_size(self.reserve);
                    add(
                        "-device",
                        format!(
                            "pcie-root-port,id=kvmmem{number},chassis={chassis},pref64-reserve={reserve}"
                        ),
                    );
                }
            }
            Machine::Pc => {
                add(
                    "-global",
                    format!("i440FX-pcihost.pci-hole64-size={}", qemu_size(self.total_reserve())),
                );
            }
        }
        add("-device", format!("vhost-vsock-pci,guest-cid={}", self.cid));
        add("-qmp", format!("unix:{},server=on,wait=off", self.qmp.display()));
        arguments
    }

    /// For the windows of all views, bytes.
    fn total_reserve(&self) -> u64 {
        self.reserve.saturating_mul(self.views)
    }
}

/// The guest-physical addresses that the windows on a target of so many bytes need. They are powers
/// of two, lie at multiples of their size, and are together at most the next power of two; twice as
/// much holds them wherever it begins, and for the descriptor's page.
fn reserve(memory: u64) -> Option<u64> {
    memory.max(1 << 20).checked_next_power_of_two()?.checked_mul(2)
}

/// A size as QEMU reads it: in the largest unit that divides it.
fn qemu_size(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

fn parse_memory(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("a target has memory".into()),
        bytes if bytes > MAX_MEMORY => Err(format!("at most {}", size(MAX_MEMORY))),
        bytes => Ok(bytes),
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match text.chars().all(is_plain) && !text.starts_with('.') && (1..=63).contains(&text.len()) {
        true => Ok(text.to_owned()),
        false => Err("letters, digits, - _ and . make a name; for others say --qmp SOCKET".into()),
    }
}

fn parse_socket(text: &str) -> Result<PathBuf, String> {
    if !text.starts_with('/') {
        return Err("QEMU has another working directory: write a path from / on".into());
    }
    if text.len() > 107 {
        return Err("a socket's path has at most 107 bytes".into());
    }
    // QEMU's options, XML and the shell each have characters of their own.
    match text.chars().all(|c| c.is_ascii_alphanumeric() || "/-_.+@".contains(c)) {
        true => Ok(text.into()),
        false => Err("only letters, digits and / - _ . + @ are written as they are".into()),
    }
}

#[cfg(test)]
mod tests;
