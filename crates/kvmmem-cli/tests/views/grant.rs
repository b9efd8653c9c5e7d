// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `grant create`, `grant list`, `grant revoke`, `policy`.

use uuid::Uuid;

use crate::common::UUID;
use crate::host;

#[test]
fn a_grant_is_printed_listed_and_revoked() {
    let host = host();
    assert_eq!(host.ask(&["grant", "list"]), "there are no grants\n");
    let text = host.ask(&["grant", "create", "victim"]);
    let (grant, token) = text.split_once('\n').unwrap();
    let grant = grant.strip_prefix("grant ").unwrap();
    let token = token.strip_prefix("token ").unwrap().trim_end();
    assert!(token.len() == 64 && token.bytes().all(|byte| byte.is_ascii_hexdigit()), "{token}");

    let options = [
        "--range",
        "16M..17M",
        "--range",
        "0x100000..0x200000",
        "--rw",
        "--ttl",
        "5m",
        "--uses",
        "3",
        "--label",
        "on call",
    ];
    let (target, holder) = (UUID.to_string(), Uuid::from_u128(7).to_string());
    let granted = host
        .ask_json(&[&["grant", "create", &target], &options[..], &["--holder", &holder]].concat());
    assert_eq!(granted["rights"], "rw");
    assert_eq!(granted["spans"][0]["gpa"], "0x100000");
    assert_eq!(granted["spans"][1]["len"], 1 << 20);
    assert_eq!((&granted["ttl_ms"], &granted["uses"]), (&300_000.into(), &3.into()));
    assert_eq!(granted["holder"], holder.as_str());

    let lines = host.ask(&["grant", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(listed["scope"]["spans"], granted["spans"]);
    assert_eq!((&listed["scope"]["rights"], &listed["uses_left"]), (&"rw".into(), &3.into()));

    let table = host.ask(&["grant", "list"]);
    for word in
        ["victim", "all RAM", "0x100000..0x200000 and 1 more", "rw", "on call", "active", &holder]
    {
        assert!(table.contains(word), "{word}: {table}");
    }
    assert!(!table.contains(token), "a token is shown again");

    let text = host.ask(&["grant", "revoke", grant]);
    assert!(text.contains(&format!("grant {grant} is revoked; 0 views ended, in ")), "{text}");
    let ended = host.view(token, &["attach"]).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let revoked = host.ask_json(&["grant", "revoke", &granted["grant"].to_string()]);
    assert_eq!((&revoked["views"], &revoked["unconfirmed"]), (&0.into(), &0.into()));
    assert!(revoked["micros"].is_u64());
}

#[test]
fn what_cannot_be_granted_is_named_with_the_remedy() {
    let host = host();
    let cases: [(&[&str], i32, &[&str]); 13] = [
        (&["victim", "--range", "0x1000..0x1800"], 2, &["0x1000..0x2000"]),
        (&["victim", "--range", "2M..1M"], 2, &["empty"]),
        (&["victim", "--range", "1M"], 2, &["START..END"]),
        (&["victim", "--range", "0..8192T"], 2, &["end at"]),
        (&["victim", "--ttl", "60"], 2, &["--ttl", "500ms"]),
        (&["victim", "--ttl", "0s"], 2, &["--ttl", "0"]),
        (&["victim", "--uses", "0"], 2, &["--uses"]),
        (&["victim", "--holder", "me"], 2, &["--holder"]),
        (
            &["victim", "--range", "1M..3M", "--range", "2M..4M"],
            2,
            &["0x100000..0x300000", "overlap"],
        ),
        (&["victim", "--range", "8M..9M"], 1, &["0x800000..0x900000", "RAM"]),
        (&["victim", "--label", "a\nb"], 2, &["label"]),
        (&["victim", "--holder", &UUID.to_string()], 1, &["the target itself"]),
        (&["nobody"], 1, &["nobody"]),
    ];
    for (arguments, code, words) in cases {
        let ended = host.run(&[&["grant", "create"], arguments].concat());
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{arguments:?} {word}: {}", ended.stderr);
        }
    }
    assert_eq!(host.ask(&["grant", "list"]), "there are no grants\n");
    let ended = host.run(&["grant", "revoke", "77"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("grant 77"), "{}", ended.stderr);
}

#[test]
fn a_policy_is_read_and_set() {
    let host = host();
    assert_eq!(host.ask(&["policy", "show", "victim"]), "victim: KVMI's tokens allow rw\n");
    for policy in ["none", "ro", "rw"] {
        let expected = format!("victim: KVMI's tokens allow {policy}\n");
        assert_eq!(host.ask(&["policy", "set", "victim", policy]), expected);
        assert_eq!(host.ask(&["policy", "show", "victim"]), expected);
    }
    for policy in ["none", "rw", "ro"] {
        assert_eq!(host.ask_json(&["policy", "set", &UUID.to_string(), policy])["policy"], policy);
        assert_eq!(host.ask_json(&["policy", "show", "victim"])["policy"], policy);
    }
    // A VM that is not registered is named by its UUID; no VM has this one.
    let nil = Uuid::nil().to_string();
    let ended = host.run(&["policy", "set", &nil, "ro"]);
    assert!(ended.code == Some(1) && ended.stderr.contains(&nil), "{}", ended.stderr);
    assert_eq!(host.run(&["policy", "set", "victim", "all"]).code, Some(2));
}
