// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a verb's token comes from: what `grant create` printed, or `--target NAME`.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{Host, UUID, finish};
use crate::host;

fn grants(host: &Host) -> Vec<Value> {
    host.ask(&["grant", "list", "--json"])
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn what_grant_prints_is_a_token_file() {
    let host = host();
    host.put(0, b"head");
    for form in [&["--json"][..], &["--print-token"], &["-q"], &[]] {
        let printed = host.ask(&[&["grant", "create", "victim", "--uses", "2"], form].concat());
        let mut child = host
            .command(&["read", "--raw", "--token-file", "-", "0", "4"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(printed.as_bytes()).unwrap();
        let ended = finish(child);
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (Some(0), "head"),
            "{form:?}: {}",
            ended.stderr
        );
        let ended = finish(host.view(&printed, &["read", "--raw", "0", "4"]).spawn().unwrap());
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (Some(0), "head"),
            "{form:?}: {}",
            ended.stderr
        );
    }
    let token = host.ask(&["grant", "create", "victim", "-q"]);
    assert!(
        token.len() == 65 && token.trim().bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{token}"
    );
    assert_eq!(host.run(&["grant", "create", "victim", "-q", "--json"]).code, Some(2));
}

#[test]
fn a_target_is_named_instead_of_a_token() {
    let host = host();
    host.put(0x1000, b"needle");
    let file = host.path("out");
    let file = file.to_str().unwrap();
    let uuid = UUID.to_string();
    let verbs: [(&[&str], i32, &str); 8] = [
        (&["read", "0x1000", "6"], 0, "needle"),
        (&["write", "0x1000", "4e"], 0, "wrote"),
        (&["attach"], 0, "read-only"),
        (&["attach", "--read-only"], 0, "read-only"),
        (&["dump", file], 0, file),
        (&["scan", "--text", "Needle"], 0, "000000001000"),
        (&["watch", "0x1000", "16", "--count", "1"], 0, "Needle"),
        (&["translate", "0x2000", "0"], 3, "not mapped"),
    ];
    for (number, (arguments, code, word)) in (1..).zip(verbs) {
        let name = if number % 2 == 0 { "victim" } else { &uuid };
        let ended = host.run(&[arguments, &["--target", name]].concat());
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stdout.contains(word), "{arguments:?}: {}", ended.stdout);

        // The broker closes the view a moment after the command has ended.
        let is_closed = |grants: &[Value]| {
            grants.iter().all(|grant| grant["views"].as_array().unwrap().is_empty())
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        let grants = std::iter::repeat_with(|| grants(&host))
            .find(|grants| is_closed(grants) || Instant::now() > deadline)
            .unwrap();
        assert_eq!(grants.len(), number, "one grant for each command");
        let grant = grants.last().unwrap();
        assert_eq!(grant["label"], format!("kvmmem {}", arguments[0]));
        assert_eq!(grant["state"], "spent");
        assert_eq!(grant["views"].as_array().unwrap().len(), 0);
        let rights = if arguments[0] == "write" { "rw" } else { "ro" };
        assert_eq!(grant["scope"]["rights"], rights, "{arguments:?}");
    }
    // A token in the environment is not used in its place.
    let (_, token) = host.grant(&[]);
    let ended = finish(
        host.view(&token, &["read", "--raw", "0x1000", "6", "--target", "victim"]).spawn().unwrap(),
    );
    assert_eq!(ended.stdout, "Needle");
    assert_eq!(finish(host.view(&token, &["read", "0", "1"]).spawn().unwrap()).code, Some(0));
}

#[test]
fn a_target_that_cannot_be_named_is_refused() {
    let host = host();
    let ended = host.run(&["read", "0", "1", "--target", "other"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("cannot grant access to \"other\""), "{}", ended.stderr);
    let token = "0f".repeat(32);
    for option in
        [["--token", &token], ["--token-file", "x"], ["--listen", "unix:/x"], ["--device", "/x"]]
    {
        let ended = host.run(&[&["read", "0", "1", "--target", "victim"], &option[..]].concat());
        assert_eq!(ended.code, Some(2), "{option:?}: {}", ended.stderr);
    }
    let ended =
        host.run(&["read", "0", "1", "--target", "victim", "--broker", "/nonexistent/sock"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("kvmmemd"), "{}", ended.stderr);
}
