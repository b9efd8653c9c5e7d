// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The order in which processes follow the one that they belong to, and threads their process.

use std::collections::HashMap;

use kvmmem_linux::tasks::Task;

/// Indices of the tasks, each process followed by its threads and then its children, with their
/// depths. Each task is there once, also where the parents that the guest reports form a circle.
pub(super) fn order(tasks: &[Task]) -> Vec<(usize, usize)> {
    let leaders = tasks.iter().enumerate().filter(|(_, task)| task.tid == task.pid);
    let by_pid: HashMap<u32, usize> = leaders.map(|(index, task)| (task.pid, index)).collect();
    let mut children: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut roots = Vec::new();
    for (index, task) in tasks.iter().enumerate() {
        let above = if task.tid == task.pid { task.ppid } else { Some(task.pid) };
        match above.and_then(|pid| by_pid.get(&pid)).filter(|parent| **parent != index) {
            Some(parent) => children.entry(*parent).or_default().push(index),
            None => roots.push(index),
        }
    }
    let mut order = Vec::with_capacity(tasks.len());
    let mut is_there = vec![false; tasks.len()];
    // Those in a ring have no root.
    for root in roots.into_iter().chain(0..tasks.len()) {
        let mut next = vec![(root, 0)];
        while let Some((index, depth)) = next.pop() {
            if is_there.get_mut(index).is_none_or(|is_there| std::mem::replace(is_there, true)) {
                continue;
            }
            order.push((index, depth));
            let below = children.get(&index).into_iter().flatten().rev();
            next.extend(below.map(|child| (*child, depth + 1)));
        }
    }
    order
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;

    pub(in super::super) fn task(pid: u32, ppid: u32) -> Task {
        Task {
            gva: 0,
            tid: pid,
            pid,
            ppid: Some(ppid),
            uid: Some(0),
            euid: Some(0),
            gid: Some(0),
            state: 'S',
            start: Some(Duration::ZERO),
            comm: String::new(),
            is_kernel: false,
            args: Default::default(),
            is_torn: false,
            is_damaged: false,
        }
    }

    #[test]
    fn threads_follow_their_process() {
        let thread = |tid, pid, ppid| Task { tid, ..task(pid, ppid) };
        // As they are listed: threads after their leader, children anywhere.
        let tasks =
            [task(1, 0), thread(3, 1, 0), task(2, 1), thread(4, 2, 1), task(5, 2), thread(9, 7, 1)];
        let tids: Vec<_> =
            order(&tasks).iter().map(|(index, depth)| (tasks[*index].tid, *depth)).collect();
        assert_eq!(tids, [(1, 0), (3, 1), (2, 1), (4, 2), (5, 2), (9, 0)]);
    }

    #[test]
    fn children_follow_their_parents_and_a_ring_is_there_once() {
        let tasks = [
            task(1, 0),
            task(2, 0),
            task(5, 1),
            task(6, 5),
            task(7, 1),
            task(8, 9),
            task(9, 8),
            task(3, 3),
            task(1, 0),
        ];
        let pids: Vec<_> =
            order(&tasks).iter().map(|(index, depth)| (tasks[*index].pid, *depth)).collect();
        assert_eq!(pids, [(1, 0), (2, 0), (3, 0), (1, 0), (5, 1), (6, 2), (7, 1), (8, 0), (9, 1)]);
    }
}
