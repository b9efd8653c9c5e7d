// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Seccomp filter: allows the calls of [`super::calls`], some of them with certain arguments only.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

use super::calls::allowed_calls;

/// Calls from this number on are younger than this list. They fail as if the kernel did not have
/// them, so that a newer C library, which tries them first, does without.
const YOUNGER: u32 = 452;

/// Types of ioctls that are allowed completely: KVM's and vhost's.
const IOCTL_TYPES: [u64; 2] = [0xae, 0xaf];

/// Other ioctls: those by which a terminal is put in raw mode and back.
const IOCTLS: [u64; 4] = [
    libc::TCGETS,
    libc::TCSETS,
    // TCGETS2 and TCSETS2
    0x802c_542a,
    0x402c_542b,
];

/// Commands of fcntl.
const FCNTLS: [i32; 7] = [
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// Options of prctl: names of threads, and those that the C library gives to its memory.
const PRCTLS: [i32; 3] = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA];

/// Why system calls are not restricted.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// The filter cannot be made.
    #[error("cannot compile the filter of system calls")]
    Compile(#[from] BackendError),
    /// A trapped call would not be reported.
    #[error("cannot handle SIGSYS")]
    Handler(#[source] io::Error),
    /// The kernel does not take it.
    #[error("the kernel does not take the filter of system calls")]
    Install(#[from] seccompiler::Error),
}

/// Restricts all threads of this process.
pub(super) fn install() -> Result<(), FilterError> {
    let program = compile()?;
    kvmmem_sys::trap::report_trapped_calls().map_err(FilterError::Handler)?;
    Ok(seccompiler::apply_filter_all_threads(&program)?)
}

fn compile() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        allowed_calls().map(|call| (call.number, Vec::new())).collect();
    let ioctl_types = IOCTL_TYPES.map(|kind| masked(1, 0xff00, kind << 8));
    let ioctls = IOCTLS.map(|number| masked(1, u32::MAX.into(), number));
    rules.insert(libc::SYS_ioctl, ioctl_types.into_iter().chain(ioctls).collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_fcntl, any_of(1, FCNTLS)?);
    rules.insert(libc::SYS_prctl, any_of(0, PRCTLS)?);
    // Signals to the own threads only.
    rules.insert(libc::SYS_tgkill, vec![masked(0, u32::MAX.into(), std::process::id().into())?]);
    // No memory is made executable.
    let not_executable = || Ok::<_, BackendError>(vec![masked(2, flag(libc::PROT_EXEC), 0)?]);
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    // Sockets of this host, and threads, but no processes.
    let unix = || Ok::<_, BackendError>(vec![masked(0, u32::MAX.into(), flag(libc::AF_UNIX))?]);
    rules.insert(libc::SYS_socket, unix()?);
    rules.insert(libc::SYS_socketpair, unix()?);
    let thread = flag(libc::CLONE_THREAD);
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);

    let filter =
        SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    let mut program = refuse_as_unknown();
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}

/// Whether the argument's bits in `mask` are `value`.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        operator,
        value,
    )?])
}

/// Whether the argument is one of `values`.
fn any_of<const N: usize>(
    argument: u8,
    values: [i32; N],
) -> Result<Vec<SeccompRule>, BackendError> {
    values.into_iter().map(|value| masked(argument, u32::MAX.into(), flag(value))).collect()
}

fn flag(flag: libc::c_int) -> u64 {
    u64::from(flag.unsigned_abs())
}

/// Answers ENOSYS to calls from [`YOUNGER`] on, and to clone3, whose flags are in memory, where no
/// filter sees them: the C library does with clone. Others come to what follows. (seccompiler has
/// one answer to all calls that match no rule.)
fn refuse_as_unknown() -> BpfProgram {
    let instruction =
        |code: u32, jt, jf, k| sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k };
    let clone3 = u32::try_from(libc::SYS_clone3).unwrap_or(u32::MAX);
    vec![
        // The first word of struct seccomp_data is the call's number.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, clone3),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, YOUNGER),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs(),
        ),
    ]
}
