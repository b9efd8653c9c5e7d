// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Help, and what is wrong with a command line.

use crate::run;

#[test]
fn help_names_the_verbs_and_the_exit_codes() {
    let (code, stdout, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for word in [
        "vm",
        "host",
        "target",
        "introspector",
        "proxy",
        "qemu-args",
        "hook",
        "doctor",
        "grant",
        "policy",
        "attach",
        "ps",
        "sockets",
        "check",
        "maps",
        "mounts",
        "dmesg",
        "modules",
        "info",
        "dump",
        "scan",
        "strings",
        "watch",
        "translate",
        "read",
        "write",
        "map",
        "Exit codes:",
        "KVMMEM_KVMI_PORT",
        "KVMMEM_TOKEN",
        "KVMMEM_GUEST_PORT",
    ] {
        assert!(stdout.contains(word), "{word}: {stdout}");
    }
}

#[test]
fn a_wrong_command_line_names_what_is_wrong() {
    let long = "x".repeat(65);
    let cases: [(&[&str], &[&str]); 41] = [
        (&["targets", "--discover"], &["'targets'", "'kvmmem target list'"]),
        (&["grant", "web-1"], &["'web-1'", "'kvmmem grant create'"]),
        (&["ps", "--watch", "--file", "x"], &["--watch", "--file"]),
        (&["ps", "--count", "3", "--file", "x"], &["--count", "--file"]),
        (&["ps", "--count", "3", "--target", "x"], &["--watch"]),
        (&["info", "--all", "--target", "x"], &["--all", "--target"]),
        (&["read", "0", "0"], &["LEN", "at least 1 byte"]),
        (&["watch", "0", "0"], &["LEN", "at least 1 byte"]),
        (&["watch", "0", "2M"], &["LEN", "0x100000"]),
        (&["read", "0xffffffffffffffff", "2"], &["0x2 bytes", "pass the end"]),
        (&["watch", "0xffffffffffffffff", "2"], &["0x2 bytes", "pass the end"]),
        (&["map", "0x1001", "--watch"], &["0x1001", "multiple of 8"]),
        (&["target", "add"], &["--pid", "--qmp", "--libvirt"]),
        (&["scan", "MZ"], &["MZ", "--text"]),
        (&["introspector", "add"], &["--pid", "--qmp", "--libvirt"]),
        (&["dump", "x", "--range", "1M..3M", "--range", "2M..4M"], &["overlap"]),
        (&["translate", "0x1000", "ffffffff81000000"], &["write 0xffffffff81000000"]),
        (&[], &["Usage"]),
        (&["frobnicate"], &["frobnicate"]),
        (&["read", "zebra", "16"], &["zebra", "0x1000"]),
        (&["read", "0x1000", "16Q"], &["16Q"]),
        (&["write", "0x1000", "abc"], &["abc", "pairs"]),
        (&["read", "0", "1", "--listen", "tcp:1"], &["tcp:1", "vsock:PORT"]),
        (&["read", "0", "1", "--timeout", "0"], &["--timeout"]),
        (&["map", "0x10000000000000000"], &["too large", "0xffffffffffffffff"]),
        (&["map", "0", "--interval", "5"], &["--watch"]),
        (&["ps", "web-1"], &["'--target web-1'"]),
        (&["strings", "web 1"], &["'--target 'web 1''"]),
        (&["read", "web-1", "0", "16"], &["'--target web-1'"]),
        (&["dump", "x", "web-1"], &["'--target web-1'"]),
        (&["ps"], &["--target NAME", "--file DUMP"]),
        (&["attach"], &["--target NAME"]),
        (&["grant", "create", "x", "--ttl", "31d"], &["--ttl", "at most 30d"]),
        (&["grant", "create", "x", "--label", &long], &["--label", "at most 64 bytes"]),
        (&["grant", "create", "x", "--label", "a\nb"], &["--label", "no control characters"]),
        (&["grant", "create", "x", "--holder", "abc"], &["--holder", "00112233-4455-6677"]),
        (&["grant", "create", "x", "--uses", "0"], &["--uses", "a whole number from 1 to"]),
        (&["grant", "revoke", "abc"], &["named by its number", "kvmmem grant list"]),
        (&["target", "add", "--pid", "x"], &["--pid", "a whole number"]),
        (&["vm", "--kernel", "x", "--uuid", "x"], &["--uuid", "00112233-4455-6677"]),
        (&["scan", "00", "--threads", "0"], &["--threads", "from 1 to 1024"]),
    ];
    for (arguments, words) in cases {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        // Nothing in the words of a library.
        for raw in ["invalid digit", "is not in", "invalid length"] {
            assert!(!stderr.contains(raw), "{arguments:?} {raw}: {stderr}");
        }
        for word in words {
            assert!(stderr.contains(word), "{arguments:?} {word}: {stderr}");
        }
    }
}

#[test]
fn a_wrong_command_line_is_json_where_json_is_wanted() {
    let cases: [(&[&str], &str); 8] = [
        (
            &["revoke", "3"],
            "unrecognized subcommand 'revoke' tip: the command is 'kvmmem grant revoke'",
        ),
        (&[], "a verb is missing: see --help"),
        (&["target"], "a verb is missing: see --help"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        (&["read"], "the following required arguments were not provided: <ADDRESS> <LEN>"),
        (
            &["read", "0", "0"],
            "invalid value '0' for '<LEN>': the length is 0; give at least 1 byte",
        ),
        (&["target", "add"], "say which one: --pid, --qmp or --libvirt"),
        (&["scan", "00", "--range", "..2M", "--range", "1M.."], "overlap"),
    ];
    for (arguments, words) in cases {
        let (code, stdout, stderr) = run(&[arguments, &["--json"]].concat());
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}");
        let error: serde_json::Value = serde_json::from_str(&stderr).expect(&stderr);
        let text = error["error"].as_str().unwrap();
        assert!(text.contains(words), "{arguments:?}: {text}");
        assert_eq!(error["causes"].as_array().unwrap().len(), 0);
    }
    let (code, stdout, _) = run(&["read", "--help", "--json"]);
    assert!(code == Some(0) && stdout.contains("Usage"), "{stdout}");
}

#[test]
fn numbers_are_written_the_same_way_in_every_place() {
    // These fail later, for another reason.
    for arguments in [
        &["read", "1M", "1MiB"][..],
        &["write", "1G", "00"],
        &["watch", "0x1M", "4KiB"],
        &["translate", "2M", "1T", "0x10k"],
        &["map", "1M", "--watch", "--interval", "20ms", "--listen", "unix:/nonexistent/x"],
        &["map", "1M", "--watch", "--interval", "20", "--device", "/nonexistent/x"],
        &["read", "0", "1", "--timeout", "1m"],
        &["dump", "/nonexistent/x", "--range", "..1M", "--range", "1M..2MiB", "--range", "1G.."],
        &["grant", "create", "x", "--ttl", "30d", "--range", "..1M", "--broker", "/nonexistent/x"],
    ] {
        let (code, _, stderr) = run(arguments);
        assert_ne!(code, Some(0), "{arguments:?}");
        assert!(!stderr.contains("invalid value"), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_verb_without_a_token_names_the_ways_to_get_one() {
    let verbs: [&[&str]; 8] = [
        &["attach"],
        &["dump", "-"],
        &["scan", "00"],
        &["strings"],
        &["watch", "0", "1"],
        &["read", "0", "1"],
        &["write", "0", "00"],
        &["translate", "0", "0"],
    ];
    for arguments in verbs {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        for word in ["kvmmem grant create NAME", "--target NAME", "--token-file", "KVMMEM_TOKEN"] {
            assert!(stderr.contains(word), "{arguments:?} {word}: {stderr}");
        }
    }
}

#[test]
fn a_machine_is_refused_by_the_option_that_is_wrong() {
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (
            &["--kernel", "/nonexistent/bzImage"],
            1,
            &["--kernel", "/nonexistent/bzImage", "No such file"],
        ),
        (
            &["--kernel", "/dev/null", "--initrd", "/nonexistent/i"],
            1,
            &["--initrd", "/nonexistent/i"],
        ),
        (&["--kernel", "/dev/null", "--serial", "stdio", "--json"], 2, &["--json", "file:PATH"]),
        (&["--kernel", "/dev/null", "--memory", "4097"], 2, &["--memory", "4096"]),
        (&["--kernel", "/dev/null", "--cpus", "0"], 2, &["--cpus", "0"]),
        (&["--kernel", "/dev/null", "--cid", "2"], 2, &["--cid", "2"]),
        (&["--kernel", "/dev/null", "--hypercalls", "port"], 2, &["--introspector"]),
        (&["--initrd", "/dev/null"], 2, &["--kernel"]),
    ];
    for (arguments, exit, words) in cases {
        let (code, _, stderr) = run(&[&["vm"], arguments].concat());
        assert_eq!(code, Some(exit), "{arguments:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{arguments:?} {word}: {stderr}");
        }
    }
}
