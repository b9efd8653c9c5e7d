// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is printed. `tests/introspector.rs` starts QEMU with it.

use clap::Parser;
use proptest::prelude::*;

use super::*;

fn parts(machine: Machine, views: u64, memory: u64, qmp: &Path) -> Parts<'_> {
    Parts { machine, views, reserve: reserve(memory).unwrap(), cid: 42, qmp }
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
    fn a_reserve_holds_all_windows(
        pieces in proptest::collection::vec(20u32..36, 1..14),
        start in 0u64..1 << 20,
    ) {
        let mut pieces: Vec<u64> = pieces.into_iter().map(|shift| 1 << shift).collect();
        pieces.sort_unstable_by(|a, b| b.cmp(a));
        let reserve = reserve(pieces.iter().sum()).unwrap();
        // Bridges begin at multiples of 1 MiB.
        let start = start << 20;
        let mut end = start;
        for piece in pieces {
            end = end.next_multiple_of(piece) + piece;
        }
        // And the descriptor's page.
        prop_assert!(end + 4096 <= start + reserve);
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
