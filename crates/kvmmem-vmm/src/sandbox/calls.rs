// SPDX-License-Identifier: Apache-2.0 OR MIT
//! System calls that a machine's process makes in its sandbox, and what makes each.
//!
//! The filter ([`super::filter`]) allows these and no others. A test records the calls of a machine
//! at work: each call of [`REGULAR`] must be among them.

/// An allowed system call.
#[derive(Clone, Copy, Debug)]
pub struct AllowedCall {
    /// Its number.
    pub number: i64,
    /// Its name.
    pub name: &'static str,
    /// What makes it.
    pub used_by: &'static str,
    /// Whether each introspector makes it that shows a view and maps a page of v1.
    pub is_regular: bool,
}

/// All system calls that the sandbox allows, some of them with certain arguments only.
pub fn allowed_calls() -> impl Iterator<Item = AllowedCall> {
    let all = |calls: &'static [Call], is_regular| {
        calls.iter().map(move |&(number, name, used_by)| AllowedCall {
            number,
            name,
            used_by,
            is_regular,
        })
    };
    all(REGULAR, true).chain(all(RARE, false))
}

/// Number, name, what makes it.
type Call = (i64, &'static str, &'static str);

/// cachestat(2), which the libc crate does not name yet.
const CACHESTAT: i64 = 451;

const REGULAR: &[Call] = &[
    (libc::SYS_ioctl, "ioctl", "KVM, vhost"),
    (libc::SYS_read, "read", "events, kernel images"),
    (libc::SYS_write, "write", "events, serial output, log"),
    (libc::SYS_lseek, "lseek", "sizes of images, SEEK for data"),
    (CACHESTAT, "cachestat", "SEEK for holes"),
    (libc::SYS_openat, "openat", "images, disks, vhost-vsock"),
    (libc::SYS_close, "close", "devices and targets that go"),
    (libc::SYS_fstat, "fstat", "identity of targets' files"),
    (libc::SYS_fstatfs, "fstatfs", "page size of targets' files"),
    (libc::SYS_fcntl, "fcntl", "copies of descriptors, seals"),
    (libc::SYS_memfd_create, "memfd_create", "descriptor pages, poison"),
    (libc::SYS_ftruncate, "ftruncate", "descriptor pages, poison"),
    (libc::SYS_fallocate, "fallocate", "pages that v1 replaces"),
    (libc::SYS_eventfd2, "eventfd2", "interrupts, notifications"),
    (libc::SYS_socket, "socket", "the broker's connection"),
    (libc::SYS_socketpair, "socketpair", "signals"),
    (libc::SYS_connect, "connect", "the broker's connection"),
    (libc::SYS_sendto, "sendto", "the broker's connection"),
    (libc::SYS_sendmsg, "sendmsg", "the broker's connection"),
    (libc::SYS_recvfrom, "recvfrom", "the broker's connection"),
    (libc::SYS_recvmsg, "recvmsg", "the broker's connection"),
    (libc::SYS_setsockopt, "setsockopt", "the broker's connection"),
    (libc::SYS_shutdown, "shutdown", "the broker's connection"),
    (libc::SYS_mmap, "mmap", "windows, vCPUs, stacks of threads"),
    (libc::SYS_munmap, "munmap", "windows, vCPUs, stacks of threads"),
    (libc::SYS_mprotect, "mprotect", "stacks of threads, heap"),
    (libc::SYS_madvise, "madvise", "windows, stacks of threads"),
    (libc::SYS_clone, "clone", "threads"),
    (libc::SYS_set_robust_list, "set_robust_list", "threads"),
    (libc::SYS_rseq, "rseq", "threads"),
    (libc::SYS_sched_getaffinity, "sched_getaffinity", "threads"),
    (libc::SYS_sigaltstack, "sigaltstack", "threads"),
    (libc::SYS_prctl, "prctl", "names of threads"),
    (libc::SYS_gettid, "gettid", "threads"),
    (libc::SYS_getpid, "getpid", "pauses of vCPUs"),
    (libc::SYS_tgkill, "tgkill", "pauses of vCPUs"),
    (libc::SYS_rt_sigreturn, "rt_sigreturn", "pauses of vCPUs"),
    (libc::SYS_rt_sigaction, "rt_sigaction", "pauses of vCPUs, signals"),
    (libc::SYS_rt_sigprocmask, "rt_sigprocmask", "threads"),
    (libc::SYS_futex, "futex", "locks"),
    (libc::SYS_clock_nanosleep, "clock_nanosleep", "pauses of vCPUs"),
    (libc::SYS_getrandom, "getrandom", "the guest's seed, hash tables"),
    (libc::SYS_exit, "exit", "threads"),
    (libc::SYS_exit_group, "exit_group", "the end"),
];

const RARE: &[Call] = &[
    (libc::SYS_pread64, "pread64", "disks"),
    (libc::SYS_pwrite64, "pwrite64", "disks that are written"),
    (libc::SYS_fdatasync, "fdatasync", "disks that are written"),
    (libc::SYS_poll, "poll", "disks, serial input"),
    (libc::SYS_ppoll, "ppoll", "poll of other C libraries"),
    (libc::SYS_newfstatat, "newfstatat", "fstat of other C libraries"),
    (libc::SYS_statx, "statx", "backtraces"),
    (libc::SYS_readlink, "readlink", "backtraces"),
    (libc::SYS_getcwd, "getcwd", "backtraces"),
    (libc::SYS_writev, "writev", "a panic's message"),
    (libc::SYS_brk, "brk", "heap of the first thread"),
    (libc::SYS_mremap, "mremap", "heap: large buffers that grow"),
    (libc::SYS_sched_yield, "sched_yield", "queues between threads"),
    (libc::SYS_clock_gettime, "clock_gettime", "time where the clock is not the TSC"),
    (libc::SYS_restart_syscall, "restart_syscall", "waits, after SIGSTOP and SIGCONT"),
];
