// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Removes what a mapping of a view that has ended shows.

use std::time::Duration;

use kvmmem_sys::foreign::Foreign;

/// How often it is tried, and how long to wait in between.
const ATTEMPTS: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// Whether the mapping is undone, if need be after several attempts: the system may be short of
/// memory, or the process at its limit of mappings.
pub(super) fn clear(memory: &Foreign) -> bool {
    for attempt in 0..ATTEMPTS {
        match memory.clear(0, memory.len()) {
            Ok(()) => return true,
            Err(error) if attempt == 0 => {
                tracing::error!(%error, address = format_args!("{:#x}", memory.address()), "cannot undo a mapping yet");
            }
            Err(_) => {}
        }
        std::thread::sleep(PAUSE);
    }
    false
}
