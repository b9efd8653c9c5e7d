// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What starts and ends between two looks at the tasks of a guest.

use std::collections::HashMap;

use kvmmem_linux::tasks::Task;

/// Whether a task started or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Started,
    Ended,
}

/// The tasks at the last look.
#[derive(Debug)]
pub(super) struct Snapshot(HashMap<u32, Task>);

impl Snapshot {
    pub(super) fn new(tasks: Vec<Task>) -> Self {
        Self(tasks.into_iter().map(|task| (task.tid, task)).collect())
    }

    /// All of them, in any order.
    pub(super) fn tasks(&self) -> impl ExactSizeIterator<Item = &Task> {
        self.0.values()
    }

    /// Takes the tasks of a later look; returns what ended, then what started, each by ascending
    /// id. An id with another start time is another task. Of a look that could not read all,
    /// what is not there has not ended.
    pub(super) fn look(&mut self, tasks: Vec<Task>, is_whole: bool) -> Vec<(Change, Task)> {
        let mut before = std::mem::take(&mut self.0);
        let mut changes = Vec::new();
        for task in tasks {
            let known = before.remove(&task.tid);
            match known {
                // The values of one that is torn may be those of another.
                Some(known) if task.is_torn || task.is_damaged => {
                    self.0.insert(task.tid, known);
                }
                Some(known) if is_same(&known, &task) => {
                    self.0.insert(task.tid, task);
                }
                known => {
                    changes.extend(known.map(|known| (Change::Ended, known)));
                    changes.push((Change::Started, task.clone()));
                    self.0.insert(task.tid, task);
                }
            }
        }
        if is_whole {
            changes.extend(before.into_values().map(|task| (Change::Ended, task)));
        } else {
            self.0.extend(before);
        }
        changes.sort_by_key(|(change, task)| (*change == Change::Started, task.tid));
        changes
    }
}

fn is_same(one: &Task, other: &Task) -> bool {
    (one.start, one.pid) == (other.start, other.pid)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tree::tests::task;
    use super::*;

    fn started(tid: u32, start: u64) -> Task {
        Task { start: Some(Duration::from_secs(start)), ..task(tid, 1) }
    }

    fn ids(changes: &[(Change, Task)]) -> Vec<(Change, u32, u64)> {
        changes
            .iter()
            .map(|(change, task)| (*change, task.tid, task.start.unwrap().as_secs()))
            .collect()
    }

    #[test]
    fn what_starts_and_ends_is_told_once() {
        let mut seen = Snapshot::new(vec![started(1, 1), started(2, 1), started(3, 1)]);
        assert_eq!(seen.look(vec![started(3, 1), started(1, 1), started(2, 1)], true), []);
        let changes =
            seen.look(vec![started(1, 1), started(9, 5), started(3, 1), started(7, 5)], true);
        let expected = [(Change::Ended, 2, 1), (Change::Started, 7, 5), (Change::Started, 9, 5)];
        assert_eq!(ids(&changes), expected);
        assert_eq!(seen.tasks().len(), 4);
        assert_eq!(
            seen.look(vec![started(1, 1), started(9, 5), started(3, 1), started(7, 5)], true),
            []
        );
    }

    #[test]
    fn an_id_that_is_used_again_is_another_task() {
        let mut seen = Snapshot::new(vec![started(1, 1), started(2, 1)]);
        let changes = seen.look(vec![started(1, 1), started(2, 8)], true);
        assert_eq!(ids(&changes), [(Change::Ended, 2, 1), (Change::Started, 2, 8)]);
    }

    #[test]
    fn one_that_is_torn_has_not_changed() {
        let mut seen = Snapshot::new(vec![started(1, 1), started(2, 1)]);
        let torn = Task { is_torn: true, ..started(2, 8) };
        assert_eq!(seen.look(vec![started(1, 1), torn], true), []);
        assert_eq!(seen.look(vec![started(1, 1), started(2, 1)], true), []);
        assert_eq!(ids(&seen.look(vec![started(2, 1)], true)), [(Change::Ended, 1, 1)]);
    }
}
