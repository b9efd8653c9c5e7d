// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connects to unix sockets whose file system may not answer, such as a network mount whose server
//! is down. The paths come from operators and from the command lines of VMMs.
//!
//! The kernel looks a path up for as long as the file system takes, and cannot be told a limit. So
//! each lookup has a thread, which is left behind where it hangs.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::time::Duration;

use kvmmem_proto::endpoint::{Endpoint, begin};
use rustix::net::sockopt::set_socket_oobinline;

use crate::file_id::FileId;

/// How long a lookup may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(2);

/// The most threads that are left behind. Where there are more, the caller's own thread hangs
/// ([`Full::Wait`]), or nothing is looked up.
const MAX_HUNG: usize = 16;

/// Virtual memory of a lookup's stack, bytes.
const STACK: usize = 64 << 10;

/// What a lookup does where [`MAX_HUNG`] others hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Wait,
    Fail,
}

/// The paths whose lookups hang. Each thread holds the other end.
static HUNG: Mutex<Vec<Weak<PathBuf>>> = Mutex::new(Vec::new());

/// A connection to a socket, and the socket's file.
///
/// # Errors
/// Those of `connect`; `TimedOut` where the file system does not answer.
pub(crate) fn connect(path: &Path) -> io::Result<(OwnedFd, Option<FileId>)> {
    look_up(path, LIMIT, Full::Wait, |path| {
        let (socket, _) = begin(&Endpoint::Unix(path.to_owned()))?;
        rustix::io::ioctl_fionbio(&socket, false)?;
        // Else a byte that is sent out of band, and a file with it, is not seen before it is
        // received.
        set_socket_oobinline(&socket, true)?;
        Ok((socket, stat(path).ok()))
    })
}

/// The file of a socket, by which it is known under each of its names.
///
/// # Errors
/// Those of `stat`; `TimedOut` where the file system does not answer.
pub(crate) fn file_id(path: &Path) -> io::Result<FileId> {
    look_up(path, LIMIT, Full::Wait, stat)
}

fn stat(path: &Path) -> io::Result<FileId> {
    Ok(FileId::of(&rustix::fs::stat(path)?))
}

/// Does `work`, which may hang, on a thread that is left behind where it does.
///
/// # Errors
/// Those of `work`; `TimedOut` where it takes longer than `limit`, or hangs still.
pub(crate) fn look_up<T: Send + 'static>(
    path: &Path,
    limit: Duration,
    full: Full,
    work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let hung: Vec<Arc<PathBuf>> = {
        let mut hung = HUNG.lock().unwrap_or_else(PoisonError::into_inner);
        hung.retain(|path| path.strong_count() > 0);
        hung.iter().filter_map(Weak::upgrade).collect()
    };
    if hung.iter().any(|hung| ***hung == *path) {
        return Err(no_answer());
    }
    if hung.len() >= MAX_HUNG {
        return if full == Full::Wait { work(path) } else { Err(no_answer()) };
    }
    let path = Arc::new(path.to_owned());
    let is_hanging = Arc::downgrade(&path);
    let (reply, result) = mpsc::channel();
    let thread = std::thread::Builder::new().name("socket-lookup".into()).stack_size(STACK);
    let spawned = thread.spawn(move || {
        let result = work(&path);
        drop(path);
        let _ = reply.send(result);
    });
    spawned.map_err(io::Error::other)?;
    result.recv_timeout(limit).unwrap_or_else(|_| {
        HUNG.lock().unwrap_or_else(PoisonError::into_inner).push(is_hanging);
        Err(no_answer())
    })
}

fn no_answer() -> io::Error {
    let words = "its file system does not answer: see whether its mount hangs, or have the socket elsewhere";
    io::Error::new(io::ErrorKind::TimedOut, words)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender};

    use super::*;

    #[test]
    fn a_path_that_hangs_is_left_and_not_tried_again_until_it_answers() {
        let (path, limit) = (Path::new("/nowhere/hung.qmp"), Duration::from_millis(1));
        let (answer, answers): (Sender<()>, Receiver<()>) = mpsc::channel();
        let hung = look_up(path, limit, Full::Wait, move |_| Ok(answers.recv()));
        assert_eq!(hung.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let again =
            look_up(path, limit, Full::Wait, |_| -> io::Result<()> { panic!("it is tried") });
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::TimedOut);
        // No other path is delayed.
        assert!(look_up(Path::new("/"), Duration::from_secs(60), Full::Wait, stat).is_ok());
        drop(answer);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while look_up(path, Duration::from_secs(60), Full::Wait, |_| Ok(())).is_err() {
            assert!(std::time::Instant::now() < deadline, "its end is not noticed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
