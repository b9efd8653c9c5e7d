// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notices when the VMMs of VMs end that have no connection to the broker.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use kvmmem_qemu::questions::Questions;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::listening::Listening;
use crate::reactor::{Handler, READABLE, Reactor, Token};
use crate::sync::lock;
use crate::workers::{Party, Workers};

/// The VMMs whose ends are waited for.
#[derive(Debug)]
pub(crate) struct Watch {
    reactor: Reactor,
    workers: Workers,
    list: Arc<Mutex<List>>,
}

#[derive(Debug, Default)]
struct List {
    watched: Vec<(Token, WatchedVmm)>,
    /// A worker looks which VMMs have ended, or is about to.
    is_looked_at: bool,
    /// One more has ended since.
    again: bool,
}

/// A VM by its number, and its VMM.
#[derive(Debug)]
pub(crate) struct WatchedVmm {
    /// Its number.
    pub(crate) vm: u64,
    /// Becomes readable when the VMM ends.
    pub(crate) pidfd: Arc<OwnedFd>,
    /// What listens to the VMM.
    pub(crate) monitor: Option<Listening>,
}

impl Watch {
    /// One that watches nothing yet.
    pub(crate) fn new(reactor: &Reactor, workers: &Workers) -> Self {
        Self { reactor: reactor.clone(), workers: workers.clone(), list: Arc::default() }
    }

    /// Waits for a VMM too. `gone` is called, by a worker, with those whose VMMs have ended: each
    /// once, and all at a time that have ended since the last call. It is the same for all of this
    /// watch.
    pub(crate) fn add(
        &self,
        watched: WatchedVmm,
        gone: impl Fn(Vec<WatchedVmm>) + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        self.workers.start()?;
        let (list, workers, gone) = (Arc::clone(&self.list), self.workers.clone(), Arc::new(gone));
        let handler: Handler = Arc::new(move |reactor, _, _| {
            let mut state = lock(&list);
            state.again = true;
            if !std::mem::replace(&mut state.is_looked_at, true) {
                drop(state);
                let (list, gone, reactor) = (Arc::clone(&list), Arc::clone(&gone), reactor.clone());
                workers.run(Party::Vmms, move || look(&reactor, &list, &*gone));
            }
        });
        let token = self.reactor.insert(handler)?;
        let pidfd = Arc::clone(&watched.pidfd);
        let vm = watched.vm;
        lock(&self.list).watched.push((token, watched));
        self.reactor.arm(token, Some((&pidfd, READABLE)), None).inspect_err(|_| {
            self.remove(vm);
        })
    }

    /// Waits no more for a VM's VMM, if it did.
    pub(crate) fn remove(&self, vm: u64) -> Option<WatchedVmm> {
        let mut list = lock(&self.list);
        let index = list.watched.iter().position(|(_, watched)| watched.vm == vm)?;
        let (token, removed) = list.watched.swap_remove(index);
        drop(list);
        self.reactor.remove(token);
        Some(removed)
    }

    /// What the monitor of a VM's VMM can be asked; `None` where there is no monitor.
    pub(crate) fn questions(&self, vm: u64) -> Option<Questions> {
        let list = lock(&self.list);
        let (_, watched) = list.watched.iter().find(|(_, watched)| watched.vm == vm)?;
        Some(watched.monitor.as_ref()?.questions().clone())
    }

    /// All VMs whose VMMs are waited for.
    pub(crate) fn vms(&self) -> Vec<u64> {
        lock(&self.list).watched.iter().map(|(_, watched)| watched.vm).collect()
    }
}

/// Calls `gone` with the VMMs that have ended, until no more have.
fn look(reactor: &Reactor, list: &Mutex<List>, gone: &impl Fn(Vec<WatchedVmm>)) {
    loop {
        let mut state = lock(list);
        state.again = false;
        let watched: Vec<(Token, Arc<OwnedFd>)> = state
            .watched
            .iter()
            .map(|(token, watched)| (*token, Arc::clone(&watched.pidfd)))
            .collect();
        drop(state);
        let ready = ready(&watched);
        let is_ready = |(token, _): &mut (Token, WatchedVmm)| ready.contains(token);
        let ended: Vec<(Token, WatchedVmm)> = lock(list).watched.extract_if(.., is_ready).collect();
        if ended.is_empty() {
            let mut state = lock(list);
            if !state.again {
                state.is_looked_at = false;
                return;
            }
            continue;
        }
        ended.iter().for_each(|(token, _)| reactor.remove(*token));
        gone(ended.into_iter().map(|(_, watched)| watched).collect());
    }
}

/// Those whose processes have ended.
fn ready(watched: &[(Token, Arc<OwnedFd>)]) -> HashSet<Token> {
    let mut fds: Vec<PollFd<'_>> =
        watched.iter().map(|(_, pidfd)| PollFd::new(&**pidfd, PollFlags::IN)).collect();
    while let Err(error) = rustix::event::poll(&mut fds, Some(&Timespec::default())) {
        if error != Errno::INTR {
            tracing::error!(%error, "cannot look which VMMs have ended");
            break;
        }
    }
    let ready = fds.iter().zip(watched).filter(|(fd, _)| !fd.revents().is_empty());
    ready.map(|(_, (token, _))| *token).collect()
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

    /// A watch, and what ends it.
    fn watch() -> (Watch, impl Fn()) {
        let reactor = Reactor::default();
        let workers = Workers::new(&reactor, "test", 2, 2);
        let watch = Watch::new(&reactor, &workers);
        let end = move || {
            reactor.end();
            workers.end();
        };
        (watch, end)
    }

    #[test]
    fn each_end_is_told_once_unless_it_is_no_more_of_interest() {
        let (told, tellings) = mpsc::channel();
        let (watch, end) = watch();
        let mut children = Vec::new();
        for vm in 1..=3 {
            let (child, pidfd) = sleeper();
            let told = told.clone();
            let watched = WatchedVmm { vm, pidfd: Arc::new(pidfd), monitor: None };
            let tell = move |ended: Vec<WatchedVmm>| {
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
        end();
        // Nothing is left of what was waited for, nor of the last sender.
        assert_eq!(tellings.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn all_that_end_meanwhile_are_told_at_once() {
        let (told, tellings) = mpsc::channel();
        let (free, is_free) = mpsc::channel::<()>();
        let (watch, end) = watch();
        let is_free = Arc::new(Mutex::new(is_free));
        let mut children: Vec<Child> = Vec::new();
        for vm in 0..20 {
            let (child, pidfd) = sleeper();
            let (told, is_free) = (told.clone(), Arc::clone(&is_free));
            let tell = move |ended: Vec<WatchedVmm>| {
                told.send(ended.len()).unwrap();
                // Until the others have ended.
                let _ = is_free.lock().unwrap().recv();
            };
            watch.add(WatchedVmm { vm, pidfd: Arc::new(pidfd), monitor: None }, tell).unwrap();
            children.push(child);
        }
        let limit = Duration::from_secs(60);
        let kill = |child: &mut Child| {
            child.kill().unwrap();
            child.wait().unwrap();
        };
        kill(&mut children[0]);
        assert_eq!(tellings.recv_timeout(limit), Ok(1));
        children[1..].iter_mut().for_each(kill);
        drop(free);
        assert_eq!(tellings.recv_timeout(limit), Ok(19));
        end();
    }
}
