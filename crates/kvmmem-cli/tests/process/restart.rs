// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that is restarted while a process of it is read: what was read is of two boots.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

use kvmmem_client::vmm::{Change, Region};
use rustix::process::Signal;
use serde_json::Value;

use crate::builder::RAM;
use crate::common::blocked::{Blocked, stop};
use crate::common::{Host, finish, signal, wait_for};
use crate::guest::{GVA, PID, guest, memory, ram, restart, target};

/// More than a pipe takes.
const LARGE: u64 = 8 << 20;

/// What is read at once.
const SMALL: u64 = 1 << 20;

/// How often a dump is begun that is to be stopped in its midst.
const TRIES: usize = 20;

const RESTARTED: &str = "the guest was restarted while it was read: run the command again\n";

#[test]
fn every_verb_about_a_process_fails_where_another_kernel_boots_meanwhile() {
    let memory = memory(&guest(LARGE), LARGE);
    let gva = GVA.to_string();
    let verbs: [&[&str]; 4] = [
        &["dump", "-"],
        &["scan", "--text", "needle"],
        &["strings"],
        &["read", &gva, "8M", "--raw"],
    ];
    for verb in verbs {
        let host = target(&memory);
        let all = [verb, &["--pid", PID, "--target", "victim"]].concat();
        let (ended, whole) = Blocked::start(host.command(&all)).end();
        assert_eq!(ended.code, Some(0), "{verb:?}: {}", ended.stderr);
        let blocked = Blocked::start(host.command(&all));
        restart(&host);
        let (ended, bytes) = blocked.end();
        assert_eq!(ended.code, Some(4), "{verb:?}: {}", ended.stderr);
        assert_eq!(ended.stderr, format!("error: victim: {RESTARTED}"), "{verb:?}");
        assert!(bytes.len() <= whole.len(), "{verb:?}");
    }
}

#[test]
fn a_reset_counts_as_a_restart_also_where_the_view_has_ended_since() {
    let memory = memory(&guest(SMALL), SMALL);
    for is_reset in [false, true] {
        let host = target(&memory);
        let (grant, token) = host.grant(&[]);
        // All memory is read by now.
        let blocked = Blocked::start(host.view(&token, &["dump", "-", "--pid", PID]));
        if is_reset {
            host.reset();
        }
        host.ask(&["grant", "revoke", &grant]);
        let (ended, _) = blocked.end();
        let code = if is_reset { 4 } else { 0 };
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        assert_eq!(ended.stderr.contains(RESTARTED), is_reset, "{}", ended.stderr);
    }
}

/// Dumps the process, of `len` bytes, to a file, does something while that is under way, and
/// returns the exit code and standard error.
fn dump_to_file(host: &Host, len: u64, act: impl FnOnce(&str)) -> (Option<i32>, String) {
    let (file, record) = (host.path("core"), host.path("core.json"));
    for _ in 0..TRIES {
        let (grant, token) = host.grant(&[]);
        let arguments = ["dump", file.to_str().unwrap(), "--pid", PID];
        let child = host.view(&token, &arguments).spawn().unwrap();
        wait_for(&file, |file| fs::metadata(file).is_ok_and(|file| file.len() > SMALL));
        let is_under_way = stop(&child) && fs::metadata(&file).unwrap().len() < len;
        if is_under_way {
            act(&grant);
            signal(&child, Signal::CONT);
            let ended = finish(child);
            assert!(!file.exists() && !record.exists(), "{}", ended.stderr);
            return (ended.code, ended.stderr);
        }
        signal(&child, Signal::CONT);
        assert_eq!(finish(child).code, Some(0));
        fs::remove_file(&file).unwrap();
        fs::remove_file(&record).unwrap();
    }
    panic!("no dump can be stopped: they are too quick")
}

#[test]
fn a_core_that_mixes_two_boots_or_ends_with_the_view_is_removed() {
    let len = 64 << 20;
    let memory = memory(&guest(len), len);
    let host = target(&memory);
    let ended = dump_to_file(&host, len, |_| restart(&host));
    assert_eq!(ended, (Some(4), format!("error: the target: {RESTARTED}")));
    ram(&host).write_all_at(&memory[..RAM], 0).unwrap();
    let revoke = |grant: &str| {
        // A process that does not run cannot confirm it.
        assert_eq!(host.run(&["grant", "revoke", grant]).code, Some(3));
    };
    let (code, stderr) = dump_to_file(&host, len, revoke);
    assert_eq!(code, Some(1), "{stderr}");
    for words in ["is not complete: begin again", "the grant was revoked"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
}

#[test]
fn the_end_of_the_view_is_no_memory_that_cannot_be_read() {
    let host = target(&memory(&guest(LARGE), LARGE));
    let (grant, token) = host.grant(&[]);
    let blocked = Blocked::start(host.view(&token, &["dump", "-", "--pid", PID]));
    host.ask(&["grant", "revoke", &grant]);
    let (ended, _) = blocked.end();
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    for words in ["the core in - is not complete: begin again", "the grant was revoked"] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
}

#[test]
fn a_watch_of_a_process_goes_on_with_more_ram_and_ends_with_a_reset() {
    let memory = memory(&guest(SMALL), SMALL);
    let len = memory.len() as u64;
    let whole = Region { gpa: 0, len, offset: 0, file: 0 };
    let more = Region { gpa: 1 << 30, len: 1 << 20, offset: len, file: 0 };
    let host = Host::start(&[whole, more]);
    ram(&host).write_all_at(&memory, 0).unwrap();
    let gva = GVA.to_string();
    let watch = ["watch", &gva, "16", "--pid", PID, "--interval", "5ms", "--json"];
    // At most a minute, if nothing ends it.
    let watch = [&watch[..], &["--count", "12000"]].concat();
    let mut child = host.view(&host.grant(&[]).1, &watch).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()["event"], "memory");
    let vm = host.vm.as_ref().unwrap();
    vm.ram_changed(vec![whole], Change::Resized);
    assert_eq!(next()["event"], "reset");
    host.put(RAM as u64, b"T");
    assert_eq!(next()["event"], "changed");
    vm.ram_changed(vec![whole], Change::Reset);
    lines.for_each(drop);
    let ended = finish(child);
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(ended.stderr.contains(RESTARTED.trim_end()), "{}", ended.stderr);
}
