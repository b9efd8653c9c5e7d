// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line with a broker and a registered virtual machine, all on this host: list, hook, read, write, unhook.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::JoinHandle;

use kvmmem_broker::link::{Region, Registration, VmmLink};
use kvmmem_broker::server::{Server, ServerError};
use kvmmem_sys::ram::GuestRam;
use uuid::Uuid;

const MEMORY: u64 = 4 << 20;
const UUID: Uuid = Uuid::from_u128(0x0011_2233_4455_4677_8899_aabb_ccdd_eeff);

/// A broker with one target.
struct Host {
    directory: tempfile::TempDir,
    _vm: VmmLink,
    ram: GuestRam,
    stop: Option<UnixStream>,
    server: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Host {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("broker.sock");
        let server = Server::bind(&socket, None).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || server.run(stopped.as_fd()));

        let ram = GuestRam::new(MEMORY).unwrap();
        let registration = Registration {
            name: "victim".to_owned(),
            uuid: UUID,
            vcpus: 2,
            start_time_ms: 0,
            cid: None,
            introspectable: true,
            introspector: false,
            regions: vec![Region { gpa: 0, len: MEMORY, offset: 0 }],
        };
        let fd = ram.fd().try_clone_to_owned().unwrap();
        let vm = VmmLink::connect(&socket, registration, Some(fd)).unwrap();
        Self { directory, _vm: vm, ram, stop: Some(stop), server: Some(server) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn endpoint(&self) -> String {
        format!("unix:{}", self.path("tool.sock").display())
    }

    /// Runs a verb that asks the broker, and wants it to succeed.
    fn ask(&self, arguments: &[&str]) -> String {
        let output = finish(spawn(&self.path("broker.sock"), arguments));
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a tool's verb.
    fn tool(&self, arguments: &[&str]) -> Child {
        let endpoint = self.endpoint();
        spawn(&self.path("broker.sock"), &[arguments, &["--listen", &endpoint]].concat())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.server.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap().unwrap();
        }
    }
}

fn spawn(broker: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_kvmmem"))
        .args(arguments)
        .env("KVMMEM_BROKER", broker)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(child: Child) -> Output {
    child.wait_with_output().unwrap()
}

#[test]
fn a_hooked_target_is_listed_read_and_written() {
    let host = Host::start();
    rustix::io::pwrite(host.ram.fd(), b"hello from the target", 0x20_0ff8).unwrap();
    let endpoint = host.endpoint();
    assert_eq!(host.ask(&["hook", "victim", &endpoint]), format!("victim is hooked to {endpoint}\n"),);

    let output = finish(host.tool(&["read", "0x200ff8", "21", "--raw"]));
    assert_eq!(output.stdout, b"hello from the target", "{}", String::from_utf8_lossy(&output.stderr));

    let output = finish(host.tool(&["write", "0x3ffffe", "abcd"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut bytes = [0; 2];
    rustix::io::pread(host.ram.fd(), &mut bytes, 0x3f_fffe).unwrap();
    assert_eq!(bytes, [0xab, 0xcd]);

    let output = finish(host.tool(&["read", "0x3fffff", "2"]));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("gpa 0x400000"), "{text}");

    let text = host.ask(&["targets"]);
    for word in ["victim", &UUID.to_string(), "4 MiB", "target", &endpoint] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&host.ask(&["--json", "targets"])).unwrap();
    assert_eq!(json["hooks"][0]["endpoint"], endpoint.as_str());
    assert_eq!(json["memory_bytes"], MEMORY);

    // The UUID names it as well.
    host.ask(&["unhook", &UUID.to_string(), &endpoint]);
    assert!(!host.ask(&["targets"]).contains(&endpoint));
}

#[test]
fn a_target_that_is_not_there_is_named() {
    let host = Host::start();
    let endpoint = host.endpoint();
    for verb in ["hook", "unhook"] {
        let output = finish(spawn(&host.path("broker.sock"), &[verb, "nobody", &endpoint]));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(text.contains("nobody"), "{text}");
    }
}
