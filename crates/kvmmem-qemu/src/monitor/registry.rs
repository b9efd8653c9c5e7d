// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The monitors that there are, by their sockets.

use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use super::{Monitor, lock};
use crate::qmp::{Qmp, QmpError};
use crate::unix_socket;

/// The monitors that there are.
#[derive(Debug, Default)]
pub struct Monitors(Mutex<Vec<Weak<Monitor>>>);

impl Monitors {
    /// A QMP connection for a conversation: that of the monitor at this socket, or a new one.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn connect(&self, path: &Path) -> Result<Qmp, QmpError> {
        let has_path = |monitor: &Monitor| monitor.path == path;
        let monitor = match self.find(has_path) {
            Some(monitor) => Some(monitor),
            // Another name of the same socket, or none's.
            None => match unix_socket::file_id(path) {
                Ok(file) => self.find(|monitor| monitor.state().file == Some(file)),
                Err(source) => {
                    return Err(QmpError::Connect { path: path.to_owned(), source });
                }
            },
        };
        monitor.map_or_else(|| Qmp::connect(path), |monitor| monitor.lend())
    }

    /// The monitor at the path of a connection, which it takes over where it is new.
    pub fn of(&self, path: &Path, qmp: Option<Qmp>) -> Arc<Monitor> {
        if let Some(monitor) = self.find(|monitor| monitor.path == path) {
            return monitor;
        }
        let monitor = Monitor::new(path.to_owned(), qmp);
        lock(&self.0).push(Arc::downgrade(&monitor));
        monitor
    }

    fn find(&self, is_it: impl Fn(&Monitor) -> bool) -> Option<Arc<Monitor>> {
        let mut monitors = lock(&self.0);
        monitors.retain(|monitor| monitor.strong_count() > 0);
        let mut monitors = monitors.iter().filter_map(Weak::upgrade);
        monitors.find(|monitor| is_it(monitor) && !monitor.state().is_stopped)
    }
}
