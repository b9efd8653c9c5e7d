// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is printed, and whether QEMU takes it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use proptest::prelude::*;

use super::*;

fn parts(machine: Machine, views: u64, memory: u64, qmp: &Path) -> Parts<'_> {
    Parts { machine, views, room: room(memory).unwrap(), cid: 42, qmp }
}

#[test]
fn arguments_are_those_that_were_tried() {
    let socket = Path::new("/run/lion.qmp");
    assert_eq!(
        parts(Machine::Q35, 2, 5 << 30, socket).arguments(),
        [
            "-device",
            "pcie-root-port,id=kvmmem0,chassis=200,pref64-reserve=16G",
            "-device",
            "pcie-root-port,id=kvmmem1,chassis=201,pref64-reserve=16G",
            "-device",
            "vhost-vsock-pci,guest-cid=42",
            "-qmp",
            "unix:/run/lion.qmp,server=on,wait=off",
        ]
    );
    let pc = parts(Machine::Pc, 3, 512 << 20, socket).arguments();
    assert_eq!(pc[..2], ["-global", "i440FX-pcihost.pci-hole64-size=3G"]);
    assert_eq!(pc.len(), 6);
}

#[test]
fn xml_names_each_port_twice() {
    let socket = Path::new("/var/lib/libvirt/qemu/lion.monitor");
    let xml = parts(Machine::Q35, 2, 4 << 30, socket).xml();
    for port in ["ua-kvmmem0", "ua-kvmmem1"] {
        assert_eq!(xml.matches(&format!("'{port}'")).count(), 2, "{xml}");
    }
    assert!(!xml.contains("ua-kvmmem2") && !xml.contains("pcihole64"), "{xml}");
    assert_eq!(xml.matches("value='8589934592'").count(), 2, "{xml}");
    assert!(
        xml.contains("value='unix:/var/lib/libvirt/qemu/lion.monitor,server=on,wait=off'"),
        "{xml}"
    );
    assert!(xml.contains("<cid auto='no' address='42'/>"), "{xml}");
    let xml = parts(Machine::Pc, 1, 1 << 30, socket).xml();
    assert!(xml.contains("<pcihole64 unit='KiB'>2097152</pcihole64>"), "{xml}");
    assert!(!xml.contains("pcie-root-port") && !xml.contains("qemu:override"), "{xml}");
}

/// The opening and closing tags pair up; comments and empty elements aside.
#[test]
fn xml_is_well_formed_but_for_the_domains_end() {
    for machine in [Machine::Q35, Machine::Pc] {
        let xml = parts(machine, 3, 4 << 30, Path::new("/a.monitor")).xml();
        let mut open = Vec::new();
        for tag in xml.split('<').skip(1).map(|tag| tag.split('>').next().unwrap()) {
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
            match tag {
                tag if tag.starts_with('!') || tag.ends_with('/') => {}
                tag if tag.starts_with('/') && name != "domain" => {
                    assert_eq!(open.pop(), Some(name), "{xml}")
                }
                tag if tag.starts_with('/') || name == "devices" => {}
                _ => open.push(name),
            }
        }
        assert_eq!(open, ["domain"], "{xml}");
    }
}

proptest! {
    /// Windows in the order of their size, the largest first, as a guest's kernel places them.
    #[test]
    fn a_room_has_place_for_all_windows(
        pieces in proptest::collection::vec(20u32..36, 1..14),
        start in 0u64..1 << 20,
    ) {
        let mut pieces: Vec<u64> = pieces.into_iter().map(|shift| 1 << shift).collect();
        pieces.sort_unstable_by(|a, b| b.cmp(a));
        let room = room(pieces.iter().sum()).unwrap();
        // Bridges begin at multiples of 1 MiB.
        let start = start << 20;
        let mut end = start;
        for piece in pieces {
            end = end.next_multiple_of(piece) + piece;
        }
        // And the descriptor's page.
        prop_assert!(end + 4096 <= start + room);
    }
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

#[test]
fn what_would_break_the_command_line_is_refused() {
    for bad in [
        ["--name", "a b"],
        ["--name", "../x"],
        ["--qmp", "relative.qmp"],
        ["--qmp", "/run/a,server=off"],
        ["--qmp", "/run/a'b"],
        ["--memory", "0"],
        ["--memory", "17T"],
        ["--views", "0"],
        ["--views", "17"],
        ["--cid", "2"],
        ["--cid", "4294967295"],
        ["--machine", "virt"],
    ] {
        assert!(Line::try_parse_from(["x"].into_iter().chain(bad)).is_err(), "{bad:?}");
    }
    let line =
        Line::try_parse_from(["x", "--memory", "16T", "--views", "16", "--name", "lion-2.x"])
            .unwrap();
    assert_eq!(line.arguments.name, "lion-2.x");
}

/// A QEMU, ended on drop.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this machine's QEMU with the arguments but for vhost-vsock, whose device not every
/// machine has, and returns what is plugged in.
#[test]
fn this_machines_qemu_takes_the_arguments() {
    let folder = tempfile::tempdir().unwrap();
    for machine in [Machine::Q35, Machine::Pc] {
        let socket = folder.path().join("qmp");
        let arguments = parts(machine, 2, 4 << 30, &socket).arguments();
        let pairs = arguments.chunks(2).filter(|pair| !pair[1].starts_with("vhost-vsock-pci"));
        let name = if machine == Machine::Q35 { "q35" } else { "pc" };
        let started = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-accel",
                "tcg",
                "-m",
                "64",
                "-S",
                "-machine",
                name,
            ])
            .args(pairs.flatten())
            .stdin(Stdio::null())
            .spawn();
        let Ok(process) = started else {
            // Past the test harness, which would keep it to itself.
            let note = "skipped: no qemu-system-x86_64: install it (Debian: qemu-system-x86)\n";
            std::io::stderr().write_all(note.as_bytes()).unwrap();
            return;
        };
        let mut qemu = Qemu(process);
        let plugged = plugged(&mut qemu, &socket);
        for id in ["kvmmem0", "kvmmem1"] {
            assert_eq!(
                plugged.contains(&format!("\"name\": \"{id}\"")),
                machine == Machine::Q35,
                "{plugged}"
            );
        }
        drop(qemu);
        let _ = std::fs::remove_file(&socket);
    }
}

/// What QMP lists of the devices with an id.
fn plugged(qemu: &mut Qemu, socket: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) => {
                assert_eq!(qemu.0.try_wait().unwrap(), None, "QEMU has ended");
                assert!(Instant::now() < deadline, "{error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut ask = |command: &str| {
        writeln!(&stream, "{command}").unwrap();
        lines
            .find(|line| line.as_ref().is_ok_and(|line| line.contains("\"return\"")))
            .unwrap()
            .unwrap()
    };
    ask("{\"execute\":\"qmp_capabilities\"}");
    ask("{\"execute\":\"qom-list\",\"arguments\":{\"path\":\"/machine/peripheral\"}}")
}
