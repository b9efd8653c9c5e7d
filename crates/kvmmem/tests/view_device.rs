// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a tool is told where there is no device that knows views; views themselves need two virtual
//! machines.

use std::path::Path;
use std::process::Command;

use kvmmem::{Access, Token, View, ViewError};

fn attach(path: &str) -> ViewError {
    View::attach_device(Path::new(path), &Token::new([0; 4]), Access::ReadOnly).unwrap_err()
}

#[test]
fn a_missing_device_comes_with_a_remedy() {
    let error = attach("/nonexistent/kvmmem");
    let text = error.to_string();
    assert!(text.contains("/nonexistent/kvmmem") && text.contains("modprobe kvmmem"), "{text}");
    assert_eq!(error.errno(), Some(2));
}

#[test]
fn something_else_is_no_device() {
    let error = attach("/dev/null");
    assert!(matches!(error, ViewError::Open { .. }) && error.errno().is_none(), "{error:?}");
}

#[test]
fn another_misc_device_knows_no_views() {
    for path in ["/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/loop-control"] {
        match attach(path) {
            // Not everybody may open it, or it is not there.
            ViewError::Open { .. } => {}
            error @ ViewError::Info { .. } => {
                let text = error.to_string();
                assert!(text.contains(path), "{text}");
            }
            error => panic!("{path}: {error}"),
        }
    }
}

/// Names both places in the process that the next test starts.
const WITHIN: &str = "KVMMEM_TEST_WITHIN";

#[test]
fn in_a_process_of_its_own() {
    if std::env::var_os(WITHIN).is_some() {
        panic!("{}", View::attach(&Token::new([0; 4]), Access::ReadOnly).unwrap_err());
    }
}

#[test]
fn where_there_is_neither_both_are_named() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "in_a_process_of_its_own"])
        .env(WITHIN, "1")
        .env("KVMMEM_DEVICE", "/nonexistent/device")
        .env("KVMMEM_BROKER", "/nonexistent/socket")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("/nonexistent/device") && text.contains("/nonexistent/socket"), "{text}");
    assert!(text.contains("modprobe kvmmem") && text.contains("kvmmemd"), "{text}");
}
