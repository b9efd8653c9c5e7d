// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any lines from a QEMU, behind a greeting: every question gets an answer or an error, and none
//! waits for what cannot come.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::LazyLock;

use kvmmem_proto::map::MemoryMap;
use kvmmem_qemu::monitor::Monitor;
use kvmmem_qemu::qmp::{Qmp, QmpError};
use kvmmem_qemu::{layout, mtree};

use libfuzzer_sys::fuzz_target;
use serde_json::json;

const GREETING: &[u8] = b"{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n{\"return\":{}}\n";

static SOCKET: LazyLock<(PathBuf, UnixListener)> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("kvmmem-fuzz-{}.qmp", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    (path, listener)
});

fuzz_target!(|bytes: &[u8]| {
    let (path, listener) = &*SOCKET;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("a connection");
            // Either side may close first.
            let _ = stream.write_all(GREETING).and_then(|()| stream.write_all(bytes));
            let _ = stream.shutdown(Shutdown::Write);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        if let Ok(qmp) = Qmp::connect(path) {
            ask(qmp);
        }
    });
});

fn ask(mut qmp: Qmp) {
    let tree = qmp.memory_tree();
    let (backends, memory, devices) =
        (qmp.memory_backends(), qmp.memory_size(), qmp.memory_devices());
    if let (Ok(tree), Ok(backends), Ok(memory), Ok(devices)) = (tree, backends, memory, devices)
        && let Ok(view) = mtree::parse(&tree)
        && let Ok(layout) = layout::from_qemu(&view, &backends, &devices, memory, &[])
    {
        let _ = MemoryMap::new(layout.regions);
    }
    let _ = (qmp.vcpus(), qmp.host_address(0), qmp.registers(0, 2), qmp.status());
    let null = std::fs::File::open("/dev/null").expect("/dev/null");
    let _ = qmp.add_fd(null.as_fd(), None);
    // What is broken stays so.
    let failed = qmp.execute("query-status", json!({}));
    if !matches!(failed, Ok(_) | Err(QmpError::Refused { .. })) {
        assert!(qmp.execute("query-status", json!({})).is_err());
    }
    // The rest comes as events to a monitor, which notices the end.
    let path = qmp.path().to_owned();
    let monitor = Monitor::new(path, Some(qmp));
    monitor.send("query-status", &json!({}), |_| {});
    while monitor.is_up() {
        monitor.step();
    }
    assert!(monitor.lend().is_err());
}
