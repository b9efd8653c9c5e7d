// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Handler of SIGSYS for system calls that the seccomp filter traps (`SECCOMP_RET_TRAP`,
//! seccomp(2)): prints the call's number on standard error, then the process ends.

use std::io;

use libc::{c_int, c_void, siginfo_t};

/// Where the kernel puts the number of the trapped call: `si_syscall` of `struct siginfo`, x86-64
/// (include/uapi/asm-generic/siginfo.h), which the libc crate does not name.
const SYSCALL_OFFSET: usize = 24;

const _: () = assert!(SYSCALL_OFFSET + size_of::<c_int>() <= size_of::<siginfo_t>());

/// From now on, a trapped system call is reported before it ends the process.
///
/// # Errors
/// That of sigaction.
pub fn report_trapped_calls() -> io::Result<()> {
    // SAFETY: sigaction is plain data, for which zeros mean no flags, an empty mask and the default
    // action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = report as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
    // The second SIGSYS, sent by the handler, is not blocked and has its default action.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: `action` is initialised, its handler has the signature that SA_SIGINFO asks for and
    // does what is allowed in a signal handler alone: see there.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes system calls and works on its own stack alone: no lock, no allocation.
extern "C" fn report(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a whole siginfo_t, within which these 4 bytes lie (see
    // SYSCALL_OFFSET), aligned to 4; they are plain bytes for each signal.
    let number = unsafe { info.byte_add(SYSCALL_OFFSET).cast::<c_int>().read() };
    let mut digits = [0; 10];
    let mut rest = number.unsigned_abs();
    let mut start = digits.len();
    for (index, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        (rest, start) = (rest / 10, index);
        if rest == 0 {
            break;
        }
    }
    for part in [
        b"the sandbox stops this process: it made system call ".as_slice(),
        digits.get(start..).unwrap_or_default(),
        b", which it should never need. Please report this; --no-sandbox runs without the sandbox\n",
    ] {
        // SAFETY: write reads `part`, which lives throughout; it may be called in a signal handler,
        // as raise may below.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: raise takes no pointers. The handler was reset when it was called, so this ends the
    // process.
    unsafe { libc::raise(libc::SIGSYS) };
}
