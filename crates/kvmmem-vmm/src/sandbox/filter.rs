// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Seccomp filter: the system calls of the VMM's own code, and those that the C library and the
//! runtime make (threads, memory, time, a panic's message).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

/// Calls from this number on are younger than this list. They fail as if the kernel did not have
/// them, so that a newer C library, which tries them first, does without.
const YOUNGER: u32 = 452;

/// cachestat(2), which the libc crate does not name yet.
const CACHESTAT: i64 = 451;

/// Calls that are allowed with any arguments.
const ALLOWED: &[i64] = &[
    // Files that are open, and those that Landlock lets it open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    CACHESTAT,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_memfd_create,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_futex,
    // The connection to the broker.
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_membarrier,
    // Threads, signals, the process's end.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_arch_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigreturn,
    libc::SYS_tgkill,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getcpu,
    libc::SYS_getrusage,
    libc::SYS_getrlimit,
    libc::SYS_prlimit64,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Types of ioctls that are allowed completely: KVM's and vhost's.
const IOCTL_TYPES: [u64; 2] = [0xae, 0xaf];

/// Other ioctls: terminals (but for TIOCSTI, which types on them), descriptors, block devices.
const IOCTLS: [u64; 14] = [
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    // TCGETS2 to TCSETSF2
    0x802c_542a,
    0x402c_542b,
    0x402c_542c,
    0x402c_542d,
    libc::TIOCGWINSZ,
    libc::FIONREAD,
    libc::FIONBIO,
    libc::FIOCLEX,
    // BLKSSZGET and BLKGETSIZE64
    0x1268,
    0x8008_1272,
];

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
        ALLOWED.iter().map(|&number| (number, Vec::new())).collect();
    let ioctl_types = IOCTL_TYPES.map(|kind| masked(1, 0xff00, kind << 8));
    let ioctls = IOCTLS.map(|number| masked(1, u32::MAX.into(), number));
    rules.insert(libc::SYS_ioctl, ioctl_types.into_iter().chain(ioctls).collect::<Result<_, _>>()?);
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
