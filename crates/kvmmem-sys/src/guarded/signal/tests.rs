// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of a SIGBUS or SIGILL, each case in a process of its own.

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use rustix::fs::MemfdFlags;

use crate::foreign::{Foreign, ForeignError};
use crate::guarded;

use super::*;

/// `si_code` of a signal that was sent to one thread.
const SI_TKILL: c_int = -6;

/// Names the case for the process that a test starts.
const CASE: &str = "KVMMEM_TEST_SIGBUS";

/// Runs a case of [`in_a_process_of_its_own`].
fn outcome(case: &str) -> ExitStatus {
    let program = std::env::current_exe().unwrap();
    let test = "guarded::signal::tests::in_a_process_of_its_own";
    let mut command = Command::new(program);
    command.args(["--exact", test, "--test-threads=1"]).env(CASE, case);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_ne!(output.status.code(), Some(0), "{case}: the test did not run or went on: {text}");
    output.status
}

/// Two pages of which the second one is not there.
fn half() -> Foreign {
    let file = rustix::fs::memfd_create("half", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 0x1000).unwrap();
    let memory = Foreign::reserve(0x2000, 0, true, 0x1000).unwrap();
    memory.place(0, 0x2000, file.as_fd(), 0).unwrap();
    memory
}

extern "C" fn exit_with_code(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel, or the handler under test, passes a whole structure; _exit is safe in a
    // handler.
    unsafe { libc::_exit(40 + (*info).si_code) }
}

extern "C" fn exit_with_number(signal: c_int) {
    // SAFETY: _exit is safe in a handler.
    unsafe { libc::_exit(30 + signal) }
}

fn set(handler: usize, flags: c_int) {
    // SAFETY: the structure is whole; handlers have the signature that their flags ask for.
    unsafe {
        let mut action: sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        for signal in SIGNALS {
            assert_eq!(sigaction(signal, &raw const action, ptr::null_mut()), 0);
        }
    }
}

fn exit(code: c_int) -> ! {
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(code) }
}

#[test]
fn in_a_process_of_its_own() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (before, what) = case.split_once(' ').unwrap();
    match before {
        "default" => set(SIG_DFL, 0),
        "ignored" => set(SIG_IGN, 0),
        "info" => set(exit_with_code as *const () as usize, libc::SA_SIGINFO),
        "plain" => set(exit_with_number as *const () as usize, 0),
        "once" => set(exit_with_number as *const () as usize, libc::SA_RESETHAND),
        _ => {}
    }
    let memory = half();
    let missing = std::ptr::with_exposed_provenance_mut::<u8>(memory.address() + 0x1000);
    assert_eq!(memory.read(0x1000, &mut [0]), Err(ForeignError::Lost { offset: 0x1000 }));
    match what {
        // SAFETY: not safe, which is what the case is about: the page is not there.
        "fault" => unsafe {
            missing.read_volatile();
        },
        // SAFETY: the foreign part is there; the buffer is not, which is what the case is about.
        "own" => unsafe {
            guarded::load(missing, std::ptr::with_exposed_provenance(memory.address()), 64);
        },
        // SAFETY: not safe either: the instruction is none.
        "illegal" => unsafe {
            core::arch::asm!("ud2");
        },
        // SAFETY: a plain call.
        "sent" => unsafe {
            libc::raise(SIGBUS);
        },
        // SAFETY: the child calls nothing but what is safe in one, and exits.
        "fork" => match unsafe { libc::fork() } {
            0 => {
                let lost =
                    memory.read(0x1000, &mut [0]) == Err(ForeignError::Lost { offset: 0x1000 });
                exit(if lost && memory.read(0, &mut [1]).is_ok() { 7 } else { 8 });
            }
            child => {
                let mut status = 0;
                // SAFETY: waits for the child just made.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                exit(libc::WEXITSTATUS(status));
            }
        },
        _ => panic!("{case}"),
    }
    exit(1);
}

#[test]
fn other_faults_end_as_they_would_have() {
    // In a Rust program that installs nothing there is the standard library's handler, which looks
    // for stack overflows.
    for case in
        ["std fault", "std own", "default fault", "default own", "ignored fault", "default sent"]
    {
        assert_eq!(outcome(case).signal(), Some(SIGBUS), "{case}");
    }
    for case in ["std illegal", "default illegal", "ignored illegal"] {
        assert_eq!(outcome(case).signal(), Some(SIGILL), "{case}");
    }
    assert_eq!(
        outcome("ignored sent").code(),
        Some(1),
        "an ignored signal that was sent is ignored"
    );
}

#[test]
fn other_faults_reach_the_handler_that_was_there() {
    assert_eq!(outcome("info fault").code(), Some(40 + BUS_ADRERR));
    assert_eq!(outcome("info own").code(), Some(40 + BUS_ADRERR));
    assert_eq!(outcome("info sent").code(), Some(40 + SI_TKILL));
    assert_eq!(outcome("info illegal").code(), Some(40 + ILL_ILLOPN));
    for before in ["plain", "once"] {
        assert_eq!(outcome(&format!("{before} illegal")).code(), Some(30 + SIGILL));
    }
    for what in ["fault", "sent"] {
        assert_eq!(outcome(&format!("plain {what}")).code(), Some(30 + SIGBUS));
        assert_eq!(outcome(&format!("once {what}")).code(), Some(30 + SIGBUS));
    }
}

#[test]
fn a_child_is_guarded_too() {
    assert_eq!(outcome("std fork").code(), Some(7));
}

/// KVM raises it for an instruction that it cannot emulate: with the instruction's address.
#[test]
fn an_instruction_that_is_not_emulated_ends_its_routine() {
    let [loads, end] =
        [kvmmem_guarded_loads, kvmmem_guarded_end].map(|symbol| symbol as *const () as usize);
    let resumed = |signal, code, rip: usize, address: usize| {
        // SAFETY: zeros are a value of both structures; the address is where the kernel has it for
        // the signals of a fault, 16 bytes from the start of a structure of 128.
        let (info, context) = unsafe {
            let mut info: siginfo_t = std::mem::zeroed();
            info.si_code = code;
            (&raw mut info).cast::<usize>().wrapping_add(2).write(address);
            let mut context: ucontext_t = std::mem::zeroed();
            context.uc_mcontext.gregs[libc::REG_RIP as usize] = rip.cast_signed() as i64;
            (info, context)
        };
        guarded_end(signal, &info, &context)
    };
    let is_end = |resumed: Option<i64>| resumed == Some(end.cast_signed() as i64);
    assert!(is_end(resumed(SIGILL, ILL_ILLOPN, loads + 9, loads + 9)));
    // Not one of the routines; sent by a process; of another instruction.
    assert_eq!(resumed(SIGILL, ILL_ILLOPN, end, end), None);
    assert_eq!(resumed(SIGILL, SI_TKILL, loads + 9, loads + 9), None);
    assert_eq!(resumed(SIGILL, ILL_ILLOPN, loads + 9, loads + 10), None);
    assert_eq!(resumed(SIGBUS, ILL_ILLOPN + 1, loads + 9, loads + 9), None);
}
