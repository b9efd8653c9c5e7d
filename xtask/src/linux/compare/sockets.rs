// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares sockets with the guest's /proc/net, of its first network namespace and of those of its
//! processes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::processes::process_ids;
use super::row::{number, text};
use crate::linux::truth::Truth;

/// Protocols whose files have the same fields.
const INET: [&str; 6] = ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"];

/// States by their numbers in /proc/net.
const STATES: [&str; 11] = [
    "established",
    "syn-sent",
    "syn-recv",
    "fin-wait-1",
    "fin-wait-2",
    "time-wait",
    "unconnected",
    "close-wait",
    "last-ack",
    "listen",
    "closing",
];

/// What /proc/net shows of a socket; of a unix socket no peer and no user.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Socket {
    protocol: String,
    kind: String,
    state: String,
    local: String,
    peer: String,
    uid: Option<u64>,
    inode: u64,
    netns: u64,
}

/// `sockets`.
pub(in crate::linux) fn sockets(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut expected = Vec::new();
    let mut namespaces = BTreeMap::from([(namespace(truth, 1)?, "/proc/net".to_owned())]);
    for pid in process_ids(truth).filter(|pid| truth.bytes(&format!("/proc/{pid}/net/tcp")).is_ok())
    {
        namespaces.entry(namespace(truth, pid)?).or_insert_with(|| format!("/proc/{pid}/net"));
    }
    ensure!(namespaces.len() == 2, "the guest shows network namespaces {namespaces:?}");
    for (netns, folder) in namespaces {
        for protocol in INET {
            let file = truth.text(&format!("{folder}/{protocol}"))?;
            for line in file.lines().skip(1) {
                expected.push(
                    inet(protocol, line, netns).with_context(|| format!("{protocol}: {line:?}"))?,
                );
            }
        }
        expected.extend(unix(&truth.text(&format!("{folder}/unix"))?, netns)?);
    }
    ensure!(expected.len() > 20, "the guest shows {} sockets only", expected.len());
    let mut found = rows.iter().map(socket).collect::<Result<Vec<_>>>()?;
    expected.sort();
    found.sort();
    ensure!(found == expected, "the sockets are {found:#?}, and should be {expected:#?}");
    held(truth, rows)?;
    peers(rows)
}

/// A row.
fn socket(row: &Value) -> Result<Socket> {
    ensure!(row["torn"] == false, "{row} is torn");
    let word = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let is_unix = row["protocol"] == "unix";
    Ok(Socket {
        protocol: text(row, "protocol")?.to_owned(),
        kind: word("type"),
        state: text(row, "state")?.to_owned(),
        local: word("local"),
        peer: word("peer"),
        uid: if is_unix { None } else { Some(number(row, "uid")?) },
        inode: number(row, "inode")?,
        netns: number(row, "netns")?,
    })
}

/// A line of /proc/net/tcp and the like.
fn inet(protocol: &str, line: &str, netns: u64) -> Result<Socket> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number).copied().context("a field is missing");
    let state = usize::from_str_radix(field(3)?, 16)?;
    Ok(Socket {
        protocol: protocol.to_owned(),
        kind: String::new(),
        state: (*STATES.get(state.wrapping_sub(1)).context("an unknown state")?).to_owned(),
        local: address(field(1)?)?.to_string(),
        peer: address(field(2)?)?.to_string(),
        uid: Some(field(7)?.parse()?),
        inode: field(9)?.parse()?,
        netns,
    })
}

/// An address: words of 4 bytes as the CPU reads them, and a port.
fn address(text: &str) -> Result<SocketAddr> {
    let (address, port) = text.split_once(':').context("no port")?;
    let mut bytes = Vec::new();
    for word in address.as_bytes().chunks(8) {
        bytes.extend(u32::from_str_radix(std::str::from_utf8(word)?, 16)?.to_le_bytes());
    }
    let address = match bytes.as_slice().try_into() {
        Ok(bytes) => IpAddr::V4(Ipv4Addr::from_octets(bytes)),
        Err(_) => IpAddr::V6(Ipv6Addr::from_octets(bytes.as_slice().try_into()?)),
    };
    Ok(SocketAddr::new(address, u16::from_str_radix(port, 16)?))
}

/// The lines of /proc/net/unix. A path may have line breaks.
fn unix(text: &str, netns: u64) -> Result<Vec<Socket>> {
    let mut sockets: Vec<Socket> = Vec::new();
    for line in text.lines().skip(1) {
        let is_first =
            line.split_once(": ").is_some_and(|(at, _)| u64::from_str_radix(at, 16).is_ok());
        if !is_first {
            let last = sockets.last_mut().context("/proc/net/unix begins within a path")?;
            last.local = last.local.clone() + "\n" + line;
            continue;
        }
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number).copied().context("a field is missing");
        let inode = field(6)?;
        // The inode is as wide as it needs to be, and a path may begin with spaces.
        let path = (0..7).fold(line, |rest, _| rest.trim_start().trim_start_matches(|c| c != ' '));
        let state = match (field(3)?, field(5)?) {
            ("00010000", _) => "listen",
            (_, "02" | "03") => "established",
            _ => "unconnected",
        };
        let kind = match field(4)? {
            "0001" => "stream",
            "0002" => "dgram",
            _ => "seqpacket",
        };
        sockets.push(Socket {
            protocol: "unix".to_owned(),
            kind: kind.to_owned(),
            state: state.to_owned(),
            local: path.strip_prefix(' ').unwrap_or(path).to_owned(),
            peer: String::new(),
            uid: None,
            inode: inode.parse()?,
            netns,
        });
    }
    Ok(sockets)
}

/// The inode of a process's network namespace.
fn namespace(truth: &Truth, pid: u64) -> Result<u64> {
    let link = truth.text(&format!("->/proc/{pid}/ns/net"))?;
    let inode = link.strip_prefix("net:[").and_then(|rest| rest.strip_suffix(']'));
    Ok(inode.with_context(|| format!("{link:?} is no namespace"))?.parse()?)
}

/// The processes that hold each socket.
fn held(truth: &Truth, rows: &[Value]) -> Result<()> {
    let mut expected: BTreeMap<u64, BTreeSet<(u64, u64)>> = BTreeMap::new();
    for (path, target) in truth.below("->/proc/") {
        let place = path.strip_prefix("->/proc/").and_then(|path| path.split_once("/fd/"));
        let target = std::str::from_utf8(target).unwrap_or_default();
        let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
        if let (Some((pid, fd)), Some(inode)) = (place, inode) {
            expected.entry(inode.parse()?).or_default().insert((pid.parse()?, fd.parse()?));
        }
    }
    ensure!(expected.len() > 15, "the guest's processes hold {} sockets only", expected.len());
    ensure!(expected.values().any(|holders| holders.len() > 1), "no socket is held twice");
    for row in rows {
        let holders = row["processes"].as_array().context("no processes")?;
        let holders =
            holders.iter().map(|holder| Ok((number(holder, "pid")?, number(holder, "fd")?)));
        let holders = holders.collect::<Result<BTreeSet<_>>>()?;
        let expected = expected.get(&number(row, "inode")?).cloned().unwrap_or_default();
        ensure!(holders == expected, "{row} should be held by {expected:?}");
        for holder in row["processes"].as_array().into_iter().flatten() {
            let comm = truth.text(&format!("/proc/{}/comm", number(holder, "pid")?))?;
            ensure!(
                text(holder, "comm")? == comm.trim_end_matches('\n'),
                "{holder} should be {comm:?}"
            );
        }
    }
    Ok(())
}

/// A unix socket is its peer's peer; one that was not accepted has no inode.
fn peers(rows: &[Value]) -> Result<()> {
    let connected = rows.iter().filter(|row| row["type"] == "seqpacket");
    let pairs = connected.map(|row| Ok((number(row, "inode")?, number(row, "peer_inode")?)));
    let pairs = pairs.collect::<Result<BTreeSet<_>>>()?;
    ensure!(pairs.len() == 2, "the pair of sockets is {pairs:?}");
    ensure!(
        pairs.iter().all(|(one, other)| pairs.contains(&(*other, *one))),
        "the peers are {pairs:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TCP: &str = "   0: 0100007F:10E1 0200007F:C8F0 0A 00000000:00000000 00:00000000 00000000  1001        0 364 1 0 100";
    const TCP6: &str = "   1: 00000000000000000000000001000000:10E2 00000000000000000000000000000000:0000 01 0:0 0:0 0     0        0 367 1 0";

    #[test]
    fn lines_of_proc_net_are_read() {
        let socket = inet("tcp", TCP, 7).unwrap();
        assert_eq!((&*socket.local, &*socket.peer), ("127.0.0.1:4321", "127.0.0.2:51440"));
        assert_eq!(
            (&*socket.state, socket.uid, socket.inode, socket.netns),
            ("listen", Some(1001), 364, 7)
        );
        let socket = inet("tcp6", TCP6, 7).unwrap();
        assert_eq!(
            (&*socket.local, &*socket.peer, &*socket.state),
            ("[::1]:4322", "[::]:0", "established")
        );
        assert!(inet("tcp", &TCP[..60], 7).is_err());
        let text = "Num RefCount\n0058fed154: 02 00 00010000 0001 01   370 /tmp/a\nb\n0025c64185: 03 00 00000000 0005 03  3\n0025c64186: 03 00 00000000 0001 02     0  /tmp/a\n";
        let sockets = unix(text, 7).unwrap();
        let values = |socket: &Socket| {
            (socket.kind.clone(), socket.state.clone(), socket.local.clone(), socket.inode)
        };
        let expected = [
            ("stream", "listen", "/tmp/a\nb", 370),
            ("seqpacket", "established", "", 3),
            ("stream", "established", " /tmp/a", 0),
        ];
        let expected =
            expected.map(|(a, b, c, inode)| (a.to_owned(), b.to_owned(), c.to_owned(), inode));
        assert_eq!(sockets.iter().map(values).collect::<Vec<_>>(), expected);
    }

    /// A guest whose process 9 has a network namespace of its own, and as many sockets as are
    /// enough.
    fn guest() -> (Truth, Vec<Value>) {
        let (mut sections, mut rows) = (Vec::new(), Vec::new());
        for pid in [1, 9] {
            sections.push((format!("/proc/{pid}/stat"), String::new()));
            sections.push((format!("/proc/{pid}/comm"), "a\n".to_owned()));
            sections.push((format!("->/proc/{pid}/ns/net"), format!("net:[{}]", 70 + pid)));
        }
        let mut line = |netns: u64, number: u64| {
            let pids = if netns == 71 { vec![9] } else { vec![1, 9] };
            let fd = number;
            for pid in &pids {
                sections.push((format!("->/proc/{pid}/fd/{fd}"), format!("socket:[{number}]")));
            }
            let processes: Vec<_> =
                pids.iter().map(|pid| json!({"pid": pid, "fd": fd, "comm": "a"})).collect();
            rows.push(json!({"protocol": "tcp", "state": "listen", "local": "127.0.0.1:4321", "peer": "127.0.0.2:51440",
                "uid": 1001, "inode": number, "netns": netns, "processes": processes, "torn": false}));
            TCP.replace("364", &number.to_string())
        };
        let tcp: Vec<_> = [(71, 0..20), (79, 20..22)]
            .map(|(netns, numbers)| {
                numbers.map(|number| line(netns, 500 + number)).collect::<Vec<_>>()
            })
            .into();
        for (folder, lines) in ["/proc/net", "/proc/9/net"].iter().zip(tcp) {
            for protocol in INET {
                let lines = if protocol == "tcp" { &lines[..] } else { &[] };
                let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
                sections.push((format!("{folder}/{protocol}"), format!("sl\n{lines}")));
            }
            sections.push((format!("{folder}/unix"), "Num\n".to_owned()));
        }
        let pair = "Num\n00ff: 3 0 00000000 0005 03 7\n00fe: 3 0 00000000 0005 03 8\n".to_owned();
        sections.retain(|(path, _)| path != "/proc/net/unix");
        sections.push(("/proc/net/unix".to_owned(), pair));
        for (inode, peer) in [(7, 8), (8, 7)] {
            rows.push(json!({"protocol": "unix", "type": "seqpacket", "state": "established", "local": null, "peer_inode": peer,
                "uid": 0, "inode": inode, "netns": 71, "processes": [], "torn": false}));
        }
        let text: String = sections
            .iter()
            .map(|(path, text)| format!("@{path} {}\n{text}\n", text.len()))
            .collect();
        (Truth::parse(format!("{text}@end 0\n\n").as_bytes()).unwrap(), rows)
    }

    #[test]
    fn sockets_that_differ_are_found() {
        let (truth, rows) = guest();
        sockets(&truth, &rows).unwrap();
        for key in [
            "protocol",
            "type",
            "state",
            "local",
            "peer",
            "uid",
            "inode",
            "netns",
            "processes",
            "torn",
        ] {
            let mut wrong = rows.clone();
            wrong[3][key] = match &wrong[3][key] {
                Value::Number(number) => json!(number.as_u64().unwrap() + 1000),
                Value::Array(_) => json!([]),
                Value::Bool(is_so) => json!(!*is_so),
                _ => json!("x"),
            };
            assert!(sockets(&truth, &wrong).is_err(), "{key}");
        }
        let mut wrong = rows.clone();
        wrong.last_mut().unwrap()["peer_inode"] = json!(8);
        assert!(sockets(&truth, &wrong).is_err());
        assert!(sockets(&truth, &rows[1..]).is_err());
    }
}
