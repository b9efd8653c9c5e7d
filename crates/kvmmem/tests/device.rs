// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a tool is told where there is no `/dev/kvmmem`; the mapping itself needs two virtual
//! machines.

use kvmmem::{Device, DeviceError};

#[test]
fn a_missing_device_comes_with_a_remedy() {
    let error = Device::open("/nonexistent/kvmmem").unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/nonexistent/kvmmem") && text.contains("modprobe kvmmem"), "{text}");
    assert!(error.errno().is_some());
}

#[test]
fn something_else_is_no_device() {
    let error = Device::open("/dev/null").unwrap_err();
    assert!(matches!(error, DeviceError::Open { .. }) && error.errno().is_none(), "{error:?}");
    assert!(error.to_string().contains("/dev/null"));
}

#[test]
fn a_device_without_access_names_the_group() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvmmem");
    std::fs::write(&path, []).unwrap();
    let locked = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    std::fs::set_permissions(&path, locked).unwrap();
    let error = Device::open(&path).unwrap_err();
    // Root may open it, and finds that it is a file.
    if error.errno().is_some() {
        assert!(error.to_string().contains("group kvmmem"), "{error}");
    }
}
