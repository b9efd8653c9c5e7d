// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Nothing is left of a view that has ended. A program of its own, because it counts what the
//! process has.

mod host;

use std::time::Instant;

use kvmmem_client::admin::Rights;

use host::{Host, PAGE, PATIENCE};
use kvmmem::{Range, Token};

/// Threads, open files and mappings of this process.
fn counts() -> (usize, usize, usize) {
    let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps.lines().filter(|line| line.contains("/memfd:")).count();
    (entries("/proc/self/task"), entries("/proc/self/fd"), maps)
}

#[test]
fn views_leave_nothing_behind() {
    let host = Host::start();
    let once = |turn: u32| {
        let (view, grant) = host.view(Rights::ReadWrite);
        let mapping = view.map(Range { gpa: 0x1000, len: 2 * PAGE }).unwrap();
        mapping.write_u64(8, 1).unwrap();
        match turn % 4 {
            0 => drop(view),
            1 => view.detach().unwrap(),
            2 => drop((mapping, view)),
            _ => assert_eq!(host.admin().revoke(grant).unwrap().unconfirmed, 0),
        }
        host.attach(&Token::new([turn.into(); 4])).unwrap_err();
    };
    // What stays for the rest of the process comes into being.
    (0..4).for_each(once);
    let settle = |before: Option<(usize, usize, usize)>| {
        let end = Instant::now() + PATIENCE;
        let mut last = counts();
        loop {
            // The broker, in this process as well, closes its side a little later.
            std::thread::sleep(std::time::Duration::from_millis(50));
            let now = counts();
            // Only before may still have had something that was about to end.
            let is_settled = match before {
                Some(before) => now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2,
                None => now == last,
            };
            if is_settled {
                return now;
            }
            assert!(Instant::now() < end, "{before:?} before, {now:?} now");
            last = now;
        }
    };
    let before = settle(None);
    (0..200).for_each(once);
    settle(Some(before));
}
