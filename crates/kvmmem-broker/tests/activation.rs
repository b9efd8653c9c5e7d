// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `kvmmemd` as a service manager starts it: a socket that is passed, a configuration
//! file.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kvmmem_client::admin::Admin;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Pid, Signal, kill_process};

/// Makes standard input descriptor 3 and passes that as a service manager does.
const PASS: &str = r#"exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@""#;

fn listener(path: &Path, kind: SocketType) -> OwnedFd {
    let listener = rustix::net::socket(AddressFamily::UNIX, kind, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).unwrap();
    listener
}

fn activated(socket: OwnedFd, options: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", PASS, env!("CARGO_BIN_EXE_kvmmemd")]).args(options);
    command.stdin(socket).stderr(Stdio::piped()).env_remove("RUST_LOG");
    command
}

/// Waits for the first line of the log.
fn first_line(daemon: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(daemon.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    line
}

#[test]
fn a_socket_that_was_passed_is_served_and_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kvmmemd.sock");
    let socket = listener(&path, SocketType::SEQPACKET);
    // The socket was there first: a client waits already when the daemon starts.
    let admin = std::thread::spawn({
        let path = path.clone();
        move || {
            let mut admin = Admin::connect(&path).unwrap();
            admin.limit_answers(Duration::from_secs(60)).unwrap();
            admin.targets().unwrap()
        }
    });
    let mut daemon = activated(socket, &["--socket", "/nowhere/at/all"]).spawn().unwrap();
    let line = first_line(&mut daemon);
    assert!(line.contains("listening") && line.contains(path.to_str().unwrap()), "{line}");
    assert_eq!(admin.join().unwrap(), []);
    // No other one takes the path away.
    let second =
        Command::new(env!("CARGO_BIN_EXE_kvmmemd")).arg("--socket").arg(&path).output().unwrap();
    assert_eq!(second.status.code(), Some(3));
    kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    assert!(path.exists());
}

#[test]
fn a_socket_of_another_type_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kvmmemd.sock");
    let output = activated(listener(&path, SocketType::STREAM), &[]).output().unwrap();
    assert_refused(&output, "SOCK_SEQPACKET");
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_refused(&activated(one.into(), &[]).output().unwrap(), "not a listening socket");
}

#[test]
fn a_configuration_file_says_where_and_its_errors_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let (config, socket) = (directory.path().join("kvmmemd.toml"), directory.path().join("k.sock"));
    std::fs::write(
        &config,
        format!("socket = {:?}\nlog = \"info\"\njson = true\n", socket.to_str().unwrap()),
    )
    .unwrap();
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmemd"));
        command.arg("--config").arg(&config).env_remove("RUST_LOG").stderr(Stdio::piped());
        command
    };
    let mut daemon = command().spawn().unwrap();
    let line = first_line(&mut daemon);
    assert!(line.starts_with('{') && line.contains("listening"), "{line}");
    assert_eq!(Admin::connect(&socket).unwrap().targets().unwrap(), []);
    kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    std::fs::write(&config, "sokcet = \"/a\"\n").unwrap();
    assert_refused(&command().output().unwrap(), "sokcet");
    std::fs::write(&config, "log = \"audit=nonsense\"\n").unwrap();
    assert_refused(&command().output().unwrap(), "audit=nonsense");
}

fn assert_refused(output: &Output, why: &str) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(why), "{told}");
}
