// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notices when the VMMs of attached VMs end: one thread waits for all of them.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use kvmmem_qemu::monitor::Monitor;
use kvmmem_qemu::questions::Questions;

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
    watched: Vec<Watched>,
    ended: bool,
}

/// A VM by its number, and its VMM.
#[derive(Debug)]
pub(crate) struct Watched {
    /// Its number.
    pub(crate) vm: u64,
    /// Becomes readable when the VMM ends.
    pub(crate) pidfd: Arc<OwnedFd>,
    /// What listens to the VMM.
    pub(crate) monitor: Option<Monitor>,
}

impl Watch {
    /// Waits for a VMM too. `gone` is called, on the thread, with those whose VMMs have ended, with
    /// each once and with all at a time that have ended since the last call; only that of the
    /// first call counts.
    ///
    /// # Errors
    /// Where there are no file descriptors or threads left.
    pub(crate) fn add(
        &self,
        watched: Watched,
        gone: impl Fn(Vec<Watched>) + Send + 'static,
    ) -> std::io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = match &*thread {
            Some(shared) => Arc::clone(shared),
            None => {
                let wake =
                    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let shared = Arc::new(Shared { wake, list: Mutex::default() });
                let watcher = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name("vmm-watch".into())
                    .spawn(move || watcher.run(gone))?;
                Arc::clone(thread.insert(shared))
            }
        };
        shared.lock().watched.push(watched);
        shared.wake();
        Ok(())
    }

    /// Waits no more for a VM's VMM, if it did.
    pub(crate) fn remove(&self, vm: u64) -> Option<Watched> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = thread.as_ref()?;
        let removed = shared.lock().take(|watched| watched.vm == vm);
        shared.wake();
        removed
    }

    /// What the monitor of a VM's VMM can be asked; `None` where there is no monitor.
    pub(crate) fn questions(&self, vm: u64) -> Option<Questions> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let list = thread.as_ref()?.lock();
        let watched = list.watched.iter().find(|watched| watched.vm == vm)?;
        Some(watched.monitor.as_ref()?.questions().clone())
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

impl List {
    fn take(&mut self, is_it: impl Fn(&Watched) -> bool) -> Option<Watched> {
        let place = self.watched.iter().position(is_it)?;
        Some(self.watched.swap_remove(place))
    }
}

impl Shared {
    fn run(&self, gone: impl Fn(Vec<Watched>)) {
        loop {
            let list = self.lock();
            if list.ended {
                return;
            }
            let watched: Vec<(u64, Arc<OwnedFd>)> = list
                .watched
                .iter()
                .map(|watched| (watched.vm, Arc::clone(&watched.pidfd)))
                .collect();
            drop(list);
            let wake = PollFd::new(&self.wake, PollFlags::IN);
            let pidfds = watched.iter().map(|(_, pidfd)| PollFd::new(&**pidfd, PollFlags::IN));
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
            let ready = fds.iter().skip(1).zip(&watched).filter(|(fd, _)| !fd.revents().is_empty());
            // A VM may have another VMM by now.
            let take = |(_, (vm, pidfd)): (_, &(u64, Arc<OwnedFd>))| {
                self.lock().take(|watched| watched.vm == *vm && Arc::ptr_eq(&watched.pidfd, pidfd))
            };
            let ended: Vec<Watched> = ready.filter_map(take).collect();
            if !ended.is_empty() {
                gone(ended);
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
            let watched = Watched { vm, pidfd: Arc::new(pidfd), monitor: None };
            let tell = move |ended: Vec<Watched>| {
                ended.iter().for_each(|ended| told.send(ended.vm).unwrap())
            };
            watch.add(watched, tell).unwrap();
            children.push(child);
        }
        drop(told);
        assert_eq!(watch.vms(), [1, 2, 3]);
        assert!(watch.remove(2).is_some() && watch.remove(2).is_none());
        for child in children.iter_mut().rev() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let limit = Duration::from_secs(60);
        let mut seen =
            [tellings.recv_timeout(limit).unwrap(), tellings.recv_timeout(limit).unwrap()];
        seen.sort_unstable();
        assert_eq!(seen, [1, 3]);
        assert!(watch.vms().is_empty() && watch.remove(1).is_none());
        drop(watch);
        // The thread ends, and with it the last sender.
        assert_eq!(tellings.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn all_that_end_meanwhile_are_told_at_once() {
        let (told, tellings) = mpsc::channel();
        let (free, is_free) = mpsc::channel::<()>();
        let watch = Watch::default();
        let tell = move |ended: Vec<Watched>| {
            told.send(ended.len()).unwrap();
            // Until the others have ended.
            let _ = is_free.recv();
        };
        let mut tell = Some(tell);
        let mut children: Vec<Child> = Vec::new();
        for vm in 0..20 {
            let (child, pidfd) = sleeper();
            let watched = Watched { vm, pidfd: Arc::new(pidfd), monitor: None };
            match tell.take() {
                Some(tell) => watch.add(watched, tell).unwrap(),
                None => watch.add(watched, |_| {}).unwrap(),
            }
            children.push(child);
        }
        let limit = Duration::from_secs(60);
        let mut end = |child: &mut Child| {
            child.kill().unwrap();
            child.wait().unwrap();
        };
        end(&mut children[0]);
        assert_eq!(tellings.recv_timeout(limit), Ok(1));
        children[1..].iter_mut().for_each(&mut end);
        drop(free);
        assert_eq!(tellings.recv_timeout(limit), Ok(19));
    }
}
