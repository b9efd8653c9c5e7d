// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `attach`, and where its token comes from.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};

use kvmmem_client::vmm::{Change, Region};
use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Host, UUID, finish, signal};
use crate::{REGIONS, host};

/// A running verb, whose lines are read one by one.
pub(crate) struct Running {
    pub(crate) child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    pub(crate) fn start(host: &Host, token: &str, arguments: &[&str]) -> Self {
        let mut child = host.view(token, arguments).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut text = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
            panic!("the verb ended: {text}");
        }
        line
    }

    #[track_caller]
    pub(crate) fn object(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }

    /// The exit code and standard error of the verb, which ends by itself.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        // It must not wait for its reader.
        self.lines.read_to_string(&mut String::new()).unwrap();
        let ended = finish(self.child);
        (ended.code, ended.stderr)
    }
}

#[test]
fn a_view_is_shown_in_both_forms() {
    let host = host();
    let ended = host.look(&["--range", "3M..5M"], &["attach"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(
        lines[0].starts_with(&format!("attached to {UUID}, open, read-only, generation ")),
        "{lines:?}"
    );
    assert_eq!(
        lines[1..],
        [
            "  0x000000300000..0x000000400000  1 MiB",
            "  0x000000400000..0x000000500000  1 MiB",
            "detached"
        ]
    );

    let mut view = Running::start(&host, &host.grant(&["--rw"]).1, &["attach", "--json"]);
    let attached = view.object();
    assert_eq!((&attached["event"], &attached["writable"]), (&"attached".into(), &true.into()));
    assert_eq!(
        (&attached["target"], &attached["state"]),
        (&UUID.to_string().into(), &"open".into())
    );
    assert_eq!(attached["ranges"].as_array().unwrap().len(), REGIONS.len());
    assert_eq!(attached["ranges"][2], serde_json::json!({ "gpa": "0x1000000", "len": 4 << 20 }));
    assert_eq!(view.object()["event"], "detached");
    assert_eq!(view.end(), (Some(0), String::new()));

    let ended = host.look(&["--rw"], &["attach", "--read-only"]);
    assert!(ended.stdout.contains("read-only"), "{}", ended.stdout);
}

#[test]
fn a_held_view_is_listed_reported_and_revoked() {
    let host = host();
    let (grant, token) = host.grant(&["--label", "held"]);
    let mut view = Running::start(&host, &token, &["attach", "--hold", "--json"]);
    let generation = view.object()["generation"].as_u64().unwrap();
    let table = host.ask(&["grant", "list"]);
    for word in ["-> view ", "host: kvmmem", "held", "spent"] {
        assert!(table.contains(word), "{word}: {table}");
    }

    let smaller = vec![Region { len: 1 << 20, ..REGIONS[0] }];
    host.vm.as_ref().unwrap().ram_changed(smaller, Change::Resized);
    let changed = view.object();
    assert_eq!(changed["event"], "changed");
    assert!(changed["generation"].as_u64().unwrap() > generation, "{changed}");
    assert_eq!(changed["ranges"].as_array().unwrap().len(), 1);

    let revoked = host.ask_json(&["grant", "revoke", &grant]);
    assert_eq!((&revoked["views"], &revoked["unconfirmed"]), (&1.into(), &0.into()));
    assert_eq!(view.object()["event"], "revoked");
    assert_eq!(view.end(), (Some(3), String::new()));
}

#[test]
fn a_held_view_ends_with_its_target_or_by_a_signal() {
    let mut host = host();
    let mut view = Running::start(&host, &host.grant(&[]).1, &["attach", "--hold"]);
    assert!(view.line().starts_with("attached"));
    signal(&view.child, Signal::INT);
    while view.line() != "detached\n" {}
    assert_eq!(view.end().0, Some(0));

    let mut view = Running::start(&host, &host.grant(&[]).1, &["attach", "--hold"]);
    assert!(view.line().starts_with("attached"));
    drop(host.vm.take());
    while !view.line().starts_with("gone") {}
    assert_eq!(view.end().0, Some(4));
}

#[test]
fn a_token_is_taken_from_wherever_it_is_given() {
    let host = host();
    let file = host.path("token");
    let file = file.to_str().unwrap();
    let token = || host.grant(&[]).1;
    assert_eq!(host.run(&["attach", "--token", &token()]).code, Some(0));
    std::fs::write(file, format!("{}\n", token())).unwrap();
    assert_eq!(host.run(&["attach", "--token-file", file]).code, Some(0));
    let mut child =
        host.command(&["attach", "--token-file", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(token().as_bytes()).unwrap();
    assert_eq!(finish(child).code, Some(0));
    // As `map` gets its token, from the broker's KVMI session.
    let endpoint = host.endpoint();
    host.ask(&["hook", "add", "victim", &endpoint]);
    let ended = host.run(&["attach", "--listen", &endpoint]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[test]
fn a_token_that_is_none_is_refused() {
    let host = host();
    let unknown = "ab".repeat(32);
    let file = host.path("token");
    std::fs::write(&file, "nonsense").unwrap();
    let cases: [(&[&str], i32, &[&str]); 6] = [
        (&["--token", "nonsense"], 2, &["64 hexadecimal digits"]),
        (&["--token", &unknown, "--token-file", "x"], 2, &["--token"]),
        (&["--token", &unknown], 1, &["token", "used"]),
        (&["--token-file", file.to_str().unwrap()], 1, &["64 hexadecimal digits"]),
        (&["--token-file", "/nonexistent/token"], 1, &["/nonexistent/token"]),
        (&[], 2, &["--token-file", "KVMMEM_TOKEN", "--listen"]),
    ];
    for (arguments, code, words) in cases {
        let ended = host.run(&[&["attach"], arguments].concat());
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{arguments:?} {word}: {}", ended.stderr);
        }
    }
    let ended = finish(host.view("nonsense", &["attach"]).spawn().unwrap());
    assert!(ended.stderr.contains("KVMMEM_TOKEN"), "{}", ended.stderr);
    // A token is for as many uses as it was granted.
    let (_, token) = host.grant(&[]);
    assert_eq!(finish(host.view(&token, &["attach"]).spawn().unwrap()).code, Some(0));
    assert_eq!(finish(host.view(&token, &["attach"]).spawn().unwrap()).code, Some(1));
}
