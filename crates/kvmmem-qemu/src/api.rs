// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The HTTP interfaces of Cloud Hypervisor and Firecracker, over unix sockets: one question, how
//! much RAM there is. They do not tell where it lies.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use kvmmem_proto::timed::TimedSocket;
use kvmmem_sys::socket::peer_credentials;
use serde_json::Value;

use super::vmm::Vmm;
use crate::unix_socket;

/// How long the answer may take.
const LIMIT: Duration = Duration::from_secs(2);

/// The longest answer that is read, bytes.
const MAX_ANSWER: usize = 1 << 20;

/// RAM from the start, bytes, as a VMM's interface says; `None` where it says nothing, or that
/// there may be more by now.
///
/// The socket is one that the VMM's command line names, and the broker may connect where the VMM
/// may not: nothing is sent unless the VMM's user listens there.
pub(crate) fn memory(vmm: Vmm, socket: &Path, user: u32) -> Option<u64> {
    match vmm {
        Vmm::CloudHypervisor => {
            let info = ask(socket, user, "/api/v1/vm.info")?;
            let memory = info.get("config")?.get("memory")?;
            let has =
                |key: &str| memory.get(key).is_some_and(|value| !matches!(value, Value::Null));
            let is_plain = !has("hotplug_size") && !has("zones");
            memory.get("size")?.as_u64().filter(|_| is_plain)
        }
        Vmm::Firecracker => {
            let config = ask(socket, user, "/machine-config")?;
            config.get("mem_size_mib")?.as_u64()?.checked_mul(1 << 20)
        }
        Vmm::Qemu | Vmm::Crosvm | Vmm::Kvmmem => None,
    }
}

/// The body of an answer.
fn ask(socket: &Path, user: u32, path: &str) -> Option<Value> {
    let (socket, _) = unix_socket::connect(socket).ok()?;
    peer_credentials(&socket).ok().filter(|listener| listener.uid == user)?;
    let mut stream = TimedSocket::new(socket.as_fd(), Instant::now() + LIMIT);
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    loop {
        if let Some(body) = body(&answer) {
            return serde_json::from_slice(body).ok();
        }
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).ok().filter(|count| *count > 0)?;
        answer.extend_from_slice(chunk.get(..count)?);
        if answer.len() > MAX_ANSWER {
            return None;
        }
    }
}

/// What follows the head of an answer that has succeeded, as soon as it is complete.
fn body(answer: &[u8]) -> Option<&[u8]> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let mut lines = head.split("\r\n");
    lines.next().filter(|status| status.starts_with("HTTP/1.") && status.contains(" 200"))?;
    let is_length = |name: &str| name.eq_ignore_ascii_case("content-length");
    let mut fields = lines.filter_map(|line| line.split_once(':'));
    let length: usize =
        fields.find_map(|(name, value)| is_length(name).then(|| value.trim().parse().ok())?)?;
    answer.get(end + 4..)?.get(..length)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn own_user() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    /// What is heard of a VMM that answers so.
    fn heard(vmm: Vmm, answer: &str) -> Option<u64> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let answer = answer.to_owned();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(answer.as_bytes());
        });
        let heard = memory(vmm, &path, own_user());
        thread.join().unwrap();
        heard
    }

    fn with_length(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\nServer: API\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn sizes_are_read_and_nothing_else_is_believed() {
        let plain =
            with_length("{\"config\":{\"memory\":{\"size\":1073741824,\"hotplug_size\":null}}}");
        assert_eq!(heard(Vmm::CloudHypervisor, &plain), Some(1 << 30));
        let firecracker = with_length("{\"vcpu_count\":2,\"mem_size_mib\":512}");
        assert_eq!(heard(Vmm::Firecracker, &firecracker), Some(512 << 20));
        for answer in [
            with_length("{\"config\":{\"memory\":{\"size\":1073741824,\"hotplug_size\":1}}}"),
            with_length("{\"config\":{\"memory\":{\"size\":-1}}}"),
            with_length("[]"),
            with_length(&"[".repeat(10_000)),
            plain.replace("200 OK", "404 Not Found"),
            plain.replace("content-length: ", "content-length: 99999"),
            "x".repeat(MAX_ANSWER + 2),
            String::new(),
        ] {
            assert_eq!(heard(Vmm::CloudHypervisor, &answer), None);
        }
        assert_eq!(memory(Vmm::Firecracker, Path::new("/nowhere/api.sock"), own_user()), None);
    }

    #[test]
    fn nothing_is_sent_to_another_user() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(memory(Vmm::Firecracker, &path, own_user() + 1), None);
        let mut sent = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut sent).unwrap();
        assert_eq!(sent, b"");
    }
}
