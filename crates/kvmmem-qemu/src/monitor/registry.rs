// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The monitors that there are, by the paths of their sockets.

use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use super::{Monitor, lock};
use crate::qmp::{Qmp, QmpError};

/// The monitors that there are.
#[derive(Debug, Default)]
pub struct Monitors(Mutex<Vec<Weak<Monitor>>>);

impl Monitors {
    /// A QMP connection for a conversation: that of the monitor at this path, or a new one.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn connect(&self, path: &Path) -> Result<Qmp, QmpError> {
        self.get(path).map_or_else(|| Qmp::connect(path), |monitor| monitor.lend())
    }

    /// The monitor at the path of a connection, which it takes over where it is new.
    pub fn of(&self, path: &Path, qmp: Option<Qmp>) -> Arc<Monitor> {
        if let Some(monitor) = self.get(path) {
            return monitor;
        }
        let monitor = Monitor::new(path.to_owned(), qmp);
        lock(&self.0).push(Arc::downgrade(&monitor));
        monitor
    }

    fn get(&self, path: &Path) -> Option<Arc<Monitor>> {
        let mut monitors = lock(&self.0);
        monitors.retain(|monitor| monitor.strong_count() > 0);
        let mut monitors = monitors.iter().filter_map(Weak::upgrade);
        monitors.find(|monitor| monitor.path == path && !monitor.state().is_stopped)
    }
}
