// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What this machine lacks: causes, a broker, a tool, and what `doctor` reports about it.

use std::io::{BufRead, BufReader};

use crate::{kvmmem, run, texts};

#[test]
fn an_error_is_told_with_its_causes() {
    let arguments = ["map", "0x1000", "--device", "/nonexistent/kvmmem"];
    let (code, stdout, stderr) = run(&arguments);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert_eq!(
        stderr,
        "error: cannot open /nonexistent/kvmmem: is the module loaded (modprobe kvmmem), and does this VM's host \
         offer mapping? See kvmmem doctor\n  1: cannot open the device\n  2: No such file or directory (os error 2)\n"
    );

    let (code, _, stderr) = run(&[&["--json"], &arguments[..]].concat());
    assert_eq!(code, Some(1));
    let error: serde_json::Value = serde_json::from_str(&stderr).unwrap();
    assert_eq!(error["causes"].as_array().unwrap().len(), 2);
}

#[test]
fn a_tool_without_a_place_to_listen_is_told_both_ways() {
    let (code, _, stderr) = run(&["read", "0", "1"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("--listen") && stderr.contains("KVMMEM_KVMI_PORT"), "{stderr}");

    let output = kvmmem(&["read", "0", "1"]).env("KVMMEM_KVMI_PORT", "many").output().unwrap();
    let (code, _, stderr) = texts(output);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("KVMMEM_KVMI_PORT") && stderr.contains("many"), "{stderr}");
}

#[test]
fn a_broker_that_is_not_there_is_named() {
    let cases: [&[&str]; 7] = [
        &["target", "list"],
        &["hook", "add", "victim", "vsock:4:5000"],
        &["hook", "remove", "victim", "unix:/x"],
        &["grant", "create", "victim"],
        &["grant", "list"],
        &["grant", "revoke", "1"],
        &["policy", "show", "victim"],
    ];
    for arguments in cases {
        let (code, _, stderr) =
            run(&[arguments, &["--broker", "/nonexistent/broker.sock"]].concat());
        assert_eq!(code, Some(1), "{arguments:?}");
        assert!(
            stderr.contains("kvmmemd") && stderr.contains("/nonexistent/broker.sock"),
            "{stderr}"
        );
    }
    let (code, _, stderr) = run(&["hook", "add", "victim", "tcp:1"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("tcp:1") && stderr.contains("vsock:CID:PORT"), "{stderr}");
}

#[test]
fn waiting_for_nobody_ends() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("unix:{}", dir.path().join("tool.sock").display());
    let (code, _, stderr) = run(&["read", "0", "1", "--timeout", "1", "--listen", &endpoint]);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("no target connected") && stderr.contains("kvmmem hook add"),
        "{stderr}"
    );
}

#[test]
fn the_doctor_agrees_with_its_exit_code_in_both_roles_and_forms() {
    for role in ["auto", "host", "guest"] {
        let (code, stdout, stderr) = run(&["doctor", "--role", role, "--json"]);
        assert_eq!(stderr, "");
        let diagnosis: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        let checks = diagnosis["checks"].as_array().unwrap();
        let uses = diagnosis["uses"].as_array().unwrap();
        let failed = uses.iter().all(|verdict| verdict["status"] == "fail");
        assert_eq!(diagnosis["usable"].as_bool(), Some(!failed));
        assert_eq!(code, Some(i32::from(failed)));
        for check in checks {
            assert_eq!(check["remedy"].is_null(), check["status"] == "ok", "{check}");
        }

        let (text_code, stdout, _) = run(&["doctor", "--role", role]);
        assert_eq!(text_code, code);
        assert!(!stdout.contains('\x1b'), "colours on a pipe");
        for check in checks {
            assert!(stdout.contains(check["name"].as_str().unwrap()), "{stdout}");
        }
        for verdict in uses {
            let what = verdict["use"].as_str().unwrap().replace('_', "-");
            let (code, _, _) = run(&["doctor", "--for", &what]);
            assert_eq!(code, Some(i32::from(verdict["status"] == "fail")), "{what}");
            for name in verdict["see"].as_array().unwrap() {
                assert!(
                    checks.iter().any(|check| check["name"] == *name && check["status"] != "ok"),
                    "{name}"
                );
            }
        }
    }
    // Root needs nothing that a host may lack to look at its machines; others need the broker.
    let look = |socket: &str| {
        let output = kvmmem(&["doctor", "--for", "look"]).env("KVMMEM_BROKER", socket).output();
        texts(output.unwrap()).0
    };
    let is_root = rustix::process::geteuid().is_root();
    assert_eq!(look("/nonexistent/broker.sock"), Some(i32::from(!is_root)));
    assert_eq!(run(&["doctor", "--for", "look", "--role", "guest"]).0, Some(2));
}

#[test]
fn a_proxy_starts_in_an_introspector_alone() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("proxy.sock");
    // No host serves this port.
    let mut proxy = kvmmem(&["proxy", "--socket", socket.to_str().unwrap()])
        .env("KVMMEM_GUEST_PORT", "1")
        .spawn()
        .unwrap();
    // It prints where it listens, or ends.
    let mut line = String::new();
    BufReader::new(proxy.stdout.take().unwrap()).read_line(&mut line).unwrap();
    // One that listens does not end by itself.
    let _ = proxy.kill();
    let (code, _, stderr) = texts(proxy.wait_with_output().unwrap());
    assert_eq!((line.as_str(), code), ("", Some(1)), "{stderr}");
    for word in
        ["not an introspector", "introspector add", "kvmmem doctor --role guest", "vsock port 1"]
    {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    assert!(!socket.exists());
}
