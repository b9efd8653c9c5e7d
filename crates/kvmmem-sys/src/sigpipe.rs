// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SIGPIPE, which Rust's runtime ignores. `kvmmem` ends by it where the reader of its output has
//! closed the pipe, as C programs do.

/// Ends this process by SIGPIPE. Returns only where the signal is blocked.
pub fn die() {
    // SAFETY: SIG_DFL installs no handler, so no code of this process runs in the context of a
    // signal; `raise` takes any signal and touches no memory.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::raise(libc::SIGPIPE);
    }
}
