// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notices when the VMMs of attached VMs end: one thread waits for all of them.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

/// The VMMs that are waited for. The thread ends with it.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    thread: Mutex<Option<Arc<Shared>>>,
}

#[derive(Debug)]
struct Shared {
    /// Written to when the list has changed.
    wake: OwnedFd,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    watched: Vec<Arc<Watched>>,
    ended: bool,
}

/// A VM by its number, and its VMM.
#[derive(Debug)]
struct Watched {
    vm: u64,
    pidfd: OwnedFd,
}

impl Watch {
    /// Waits for a VMM too. `gone` is called, on the thread, with each VM whose VMM has ended, once; only that of the
    /// first call counts.
    ///
    /// # Errors
    /// Where there are no file descriptors or threads left.
    pub(crate) fn add(
        &self,
        vm: u64,
        pidfd: OwnedFd,
        gone: impl Fn(u64) + Send + 'static,
    ) -> std::io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = match &*thread {
            Some(shared) => Arc::clone(shared),
            None => {
                let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let shared = Arc::new(Shared { wake, list: Mutex::default() });
                let watcher = Arc::clone(&shared);
                std::thread::Builder::new().name("vmm-watch".into()).spawn(move || watcher.run(gone))?;
                Arc::clone(thread.insert(shared))
            }
        };
        shared.lock().watched.push(Arc::new(Watched { vm, pidfd }));
        shared.wake();
        Ok(())
    }

    /// Waits no more for a VM's VMM; whether it did.
    pub(crate) fn remove(&self, vm: u64) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(shared) = &*thread else { return false };
        let mut list = shared.lock();
        let before = list.watched.len();
        list.watched.retain(|watched| watched.vm != vm);
        let removed = list.watched.len() < before;
        drop(list);
        shared.wake();
        removed
    }

    /// All VMs whose VMMs are waited for.
    pub(crate) fn vms(&self) -> Vec<u64> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread
            .iter()
            .flat_map(|shared| shared.lock().watched.iter().map(|w| w.vm).collect::<Vec<_>>())
            .collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(shared) = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner) {
            shared.lock().ended = true;
            shared.wake();
        }
    }
}

impl Shared {
    fn run(&self, gone: impl Fn(u64)) {
        loop {
            let list = self.lock();
            if list.ended {
                return;
            }
            let watched = list.watched.clone();
            drop(list);
            let wake = PollFd::new(&self.wake, PollFlags::IN);
            let pidfds = watched.iter().map(|watched| PollFd::new(&watched.pidfd, PollFlags::IN));
            let mut fds: Vec<PollFd<'_>> = std::iter::once(wake).chain(pidfds).collect();
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for VMMs; their ends are not noticed any more");
                    return;
                }
            }
            // Whether there was anything to read does not matter.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            let ready: Vec<u64> = fds
                .iter()
                .skip(1)
                .zip(&watched)
                .filter(|(fd, _)| !fd.revents().is_empty())
                .map(|(_, watched)| watched.vm)
                .collect();
            drop(fds);
            for vm in ready {
                let mut list = self.lock();
                let before = list.watched.len();
                list.watched.retain(|watched| watched.vm != vm);
                let is_watched = list.watched.len() < before;
                drop(list);
                if is_watched {
                    gone(vm);
                }
            }
        }
    }

    fn wake(&self) {
        // It fails only where the counter is at its end, and then the thread wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::process::{Pid, PidfdFlags};

    use super::*;

    fn sleeper() -> (Child, OwnedFd) {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        (child, pidfd)
    }

    #[test]
    fn each_end_is_told_once_unless_it_is_no_more_of_interest() {
        let (told, tellings) = mpsc::channel();
        let watch = Watch::default();
        let mut children = Vec::new();
        for vm in 1..=3 {
            let (child, pidfd) = sleeper();
            let told = told.clone();
            watch.add(vm, pidfd, move |vm| told.send(vm).unwrap()).unwrap();
            children.push(child);
        }
        drop(told);
        assert_eq!(watch.vms(), [1, 2, 3]);
        assert!(watch.remove(2) && !watch.remove(2));
        for child in children.iter_mut().rev() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let limit = Duration::from_secs(10);
        let mut seen = [tellings.recv_timeout(limit).unwrap(), tellings.recv_timeout(limit).unwrap()];
        seen.sort_unstable();
        assert_eq!(seen, [1, 3]);
        assert!(watch.vms().is_empty() && !watch.remove(1));
        drop(watch);
        // The thread ends, and with it the last sender.
        assert_eq!(tellings.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Disconnected));
    }
}
