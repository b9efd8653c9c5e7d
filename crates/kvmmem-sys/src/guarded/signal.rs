// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Handler of SIGBUS and SIGILL for the guarded accesses.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{SIG_DFL, SIG_IGN, SIGBUS, SIGILL, sigaction, siginfo_t, ucontext_t};
use rustix::io::Errno;

/// `si_code` of a page fault that cannot be served (`BUS_ADRERR` of `<asm-generic/siginfo.h>`).
const BUS_ADRERR: c_int = 2;

/// `si_code` of an access to memory that the hardware has lost (`BUS_MCEERR_AR`).
const BUS_MCEERR_AR: c_int = 4;

const PAGE_MASK: usize = 4095;

/// `si_code` of an instruction that the processor, or KVM in its place, does not execute
/// (`ILL_ILLOPN`).
const ILL_ILLOPN: c_int = 2;

unsafe extern "sysv64" {
    /// Where the loads from foreign memory begin in `copies.s`.
    fn kvmmem_guarded_loads();
    /// Where they end and the stores begin.
    fn kvmmem_guarded_stores();
    /// Where the stores end: an interrupted routine continues here.
    fn kvmmem_guarded_end();
}

/// The signals that are handled.
const SIGNALS: [c_int; 2] = [SIGBUS, SIGILL];

/// What was to happen on each of [`SIGNALS`] before [`handle`] was installed; never freed, as a
/// handler may be reading it.
static PREVIOUS: [AtomicPtr<sigaction>; 2] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];

static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();

thread_local! {
    /// Whether [`prepare`] has returned on this thread.
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Makes guarded copies safe on this thread: installs the handler, once in the process, and
/// unblocks both signals, once in the thread. A fault kills a thread that blocks its signal, so it
/// must not block it again.
///
/// # Errors
/// The system's, if it refuses; it has no documented reason to.
#[inline]
pub(crate) fn prepare() -> Result<(), Errno> {
    if PREPARED.get() { Ok(()) } else { prepare_thread() }
}

#[cold]
fn prepare_thread() -> Result<(), Errno> {
    (*INSTALLED.get_or_init(install))?;
    let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset fills in the set that it is given, the others read and change that set
    // alone; a null third argument is allowed, and unblocking a signal breaks nothing that this
    // crate relies on.
    let result = unsafe {
        libc::sigemptyset(signals.as_mut_ptr());
        for signal in SIGNALS {
            libc::sigaddset(signals.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, signals.as_ptr(), ptr::null_mut())
    };
    if result != 0 {
        return Err(Errno::from_raw_os_error(result));
    }
    PREPARED.set(true);
    Ok(())
}

fn install() -> Result<(), Errno> {
    SIGNALS.iter().zip(&PREVIOUS).try_for_each(|(signal, previous)| install_for(*signal, previous))
}

fn install_for(signal: c_int, kept: &AtomicPtr<sigaction>) -> Result<(), Errno> {
    let failed = || Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL);
    let mut previous = MaybeUninit::<sigaction>::uninit();
    // SAFETY: a null new action is allowed; the old one is written to `previous`.
    if unsafe { sigaction(signal, ptr::null(), previous.as_mut_ptr()) } != 0 {
        return Err(failed());
    }
    // SAFETY: the call above succeeded, so it has filled `previous` in.
    let previous = unsafe { previous.assume_init() };
    // Before the handler is installed, because it reads it.
    kept.store(Box::into_raw(Box::new(previous)), Ordering::Release);

    let mut action = previous;
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = handle;
    action.sa_sigaction = handler as *const () as usize;
    // What the previous handler ran with, since it runs within this one. Threads with a small stack
    // of their own have an alternate one for signals.
    action.sa_flags = libc::SA_SIGINFO
        | libc::SA_ONSTACK
        | previous.sa_flags & (libc::SA_NODEFER | libc::SA_RESTART);
    let mut replaced = MaybeUninit::<sigaction>::uninit();
    // SAFETY: `action` is a whole action whose handler has the signature that SA_SIGINFO asks for
    // and calls only what is safe in a signal handler; the old action is written to `replaced`.
    if unsafe { sigaction(signal, &raw const action, replaced.as_mut_ptr()) } != 0 {
        return Err(failed());
    }
    // SAFETY: the call above succeeded, so it has filled `replaced` in.
    let replaced = unsafe { replaced.assume_init() };
    if replaced.sa_sigaction != previous.sa_sigaction || replaced.sa_flags != previous.sa_flags {
        // Another thread was quicker with one of its own.
        kept.store(Box::into_raw(Box::new(replaced)), Ordering::Release);
    }
    Ok(())
}

/// Ends the guarded routine that met the signal, or passes the signal on.
extern "C" fn handle(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel calls this as the handler of an action with SA_SIGINFO, so both pointers
    // lead to whole structures that are this call's alone, the second one to a ucontext_t of
    // this architecture.
    unsafe {
        if let Some(end) = guarded_end(signal, &*info, &*context.cast::<ucontext_t>()) {
            if let Some(rip) =
                (*context.cast::<ucontext_t>()).uc_mcontext.gregs.get_mut(libc::REG_RIP as usize)
            {
                *rip = end;
            }
            return;
        }
        pass_on(signal, info, context);
    }
}

/// The address to resume at, if a guarded routine faulted on foreign memory.
fn guarded_end(signal: c_int, info: &siginfo_t, context: &ucontext_t) -> Option<i64> {
    // A signal sent by kill(2) may interrupt a routine anywhere; only faults are the routine's own.
    let is_fault = match signal {
        SIGBUS => info.si_code == BUS_ADRERR || info.si_code == BUS_MCEERR_AR,
        _ => info.si_code == ILL_ILLOPN,
    };
    if !is_fault {
        return None;
    }
    // Address bits: the sign has no meaning.
    #[allow(clippy::cast_sign_loss, clippy::cast_possible_truncation)]
    let register =
        |index: c_int| context.uc_mcontext.gregs.get(index as usize).map(|&value| value as usize);
    let [loads, stores, end] = [kvmmem_guarded_loads, kvmmem_guarded_stores, kvmmem_guarded_end]
        .map(|symbol: unsafe extern "sysv64" fn()| symbol as *const () as usize);
    let rip = register(libc::REG_RIP)?;
    let foreign = match rip {
        rip if (loads..stores).contains(&rip) => register(libc::REG_RSI)?,
        rip if (stores..end).contains(&rip) => register(libc::REG_RDI)?,
        _ => return None,
    };
    // SAFETY: the signals of these codes carry an address.
    let address = unsafe { info.si_addr() } as usize;
    if signal == SIGILL {
        // Nothing but an access needs emulation: the other instructions are ones that every
        // processor has, or that were asked for.
        #[allow(clippy::cast_possible_wrap)]
        return (address == rip).then_some(end as i64);
    }
    // The kernel may tell the page alone.
    let first = foreign & !PAGE_MASK;
    let last = foreign.wrapping_add(register(libc::REG_RCX)?).wrapping_sub(1) | PAGE_MASK;
    #[allow(clippy::cast_possible_wrap)]
    (first..=last).contains(&address).then_some(end as i64)
}

/// Does what would have been done without [`handle`].
///
/// # Safety
/// To be called by a handler of `signal`, with what it got.
unsafe fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let [of_bus, of_illegal] = &PREVIOUS;
    let previous = if signal == SIGBUS { of_bus } else { of_illegal };
    // SAFETY: null, or a structure that is never freed nor changed.
    let previous = unsafe { previous.load(Ordering::Acquire).as_ref() };
    let (action, flags) = previous.map_or((SIG_DFL, 0), |old| (old.sa_sigaction, old.sa_flags));
    // SAFETY: the caller's `info` is whole.
    let is_sent = unsafe { (*info).si_code } <= 0;
    match action {
        SIG_IGN if is_sent => {}
        // The kernel does not ignore a fault either.
        SIG_DFL | SIG_IGN => {
            // SAFETY: plain calls that are safe in a handler. An instruction that faulted does so
            // again after this returns; a signal that was sent must be sent again, and
            // is delivered when this returns.
            unsafe {
                libc::signal(signal, SIG_DFL);
                if is_sent {
                    libc::raise(signal);
                }
            }
        }
        handler => {
            if flags & libc::SA_RESETHAND != 0 {
                // SAFETY: a plain call that is safe in a handler.
                unsafe { libc::signal(signal, SIG_DFL) };
            }
            if flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with SA_SIGINFO the number is the address of a function of this type, for
                // which the kernel itself would have called it.
                let handler = unsafe {
                    std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(
                        handler,
                    )
                };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO the number is the address of a function of this type.
                let handler =
                    unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests;
