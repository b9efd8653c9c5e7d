// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The monitors that there are, by their sockets.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::monitor::Monitor;
use crate::qmp::{Qmp, QmpError};
use crate::unix_socket;

/// The monitors that there are.
#[derive(Debug, Default)]
pub struct Monitors(Mutex<Vec<Weak<Monitor>>>);

impl Monitors {
    /// A QMP connection for a conversation: that of the monitor at this socket, or a new one.
    pub fn connect(&self, path: &Path) -> Result<Qmp, QmpError> {
        let has_path = |monitor: &Monitor| monitor.path() == path && monitor.is_active();
        let monitor = match self.find(has_path) {
            Some(monitor) => Some(monitor),
            // Another name of the same socket, or none's.
            None => match unix_socket::file_id(path) {
                Ok(file) => self.find(|monitor| monitor.is_of(file)),
                Err(source) => {
                    return Err(QmpError::Connect { path: path.to_owned(), source });
                }
            },
        };
        monitor.map_or_else(|| Qmp::connect(path), |monitor| monitor.lend())
    }

    /// The monitor at the path of a connection, which it takes over where it is new or has ended.
    /// The caller subscribes.
    pub fn of(&self, path: &Path, qmp: Option<Qmp>) -> Arc<Monitor> {
        // Also one that has ended: another caller may be about to subscribe to it, and QEMU serves
        // one connection.
        if let Some(monitor) = self.find(|monitor| monitor.path() == path) {
            monitor.expect_user(qmp);
            return monitor;
        }
        let monitor = Monitor::new(path.to_owned(), qmp);
        self.lock().push(Arc::downgrade(&monitor));
        monitor
    }

    fn find(&self, is_it: impl Fn(&Monitor) -> bool) -> Option<Arc<Monitor>> {
        let mut monitors = self.lock();
        monitors.retain(|monitor| monitor.strong_count() > 0);
        let mut monitors = monitors.iter().filter_map(Weak::upgrade);
        monitors.find(|monitor| is_it(monitor))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Monitor>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
