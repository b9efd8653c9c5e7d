// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Details of a process: address space, program, environment and namespaces.

use crate::budget::{Budget, LISTING};
use crate::kernel::{Kernel, KernelError};
use crate::paths::{FilePath, Paths};
use crate::space::Space;
use crate::tasks::{Args, Task, Tasks, Which};

/// The longest environment that is read, bytes.
const MAX_ENVIRONMENT: u64 = 128 << 10;

/// What all processes together may take: each the path of its program, and the words of its
/// environment.
const LIMIT: &str = "1 GiB of programs and environments, or the limit that was set";

/// Walks of the list of processes while it changes.
const TRIES: u32 = 3;

/// The lowest number of a namespace: below those of the first ones (`PROC_DYNAMIC_FIRST`,
/// include/linux/proc_ns.h).
pub(crate) const FIRST_NAMESPACE: u32 = 0xefff_ff00;

/// The deepest namespace of process ids (`MAX_PID_NS_LEVEL`).
const MAX_LEVEL: u32 = 32;

impl<'m> Kernel<'m> {
    /// The process with this id, in the first namespace.
    ///
    /// # Errors
    /// [`KernelError::NoProcess`], or as [`Tasks`].
    pub fn task(&self, pid: u32) -> Result<Task, KernelError> {
        let find = || {
            let mut lost = None;
            for task in Tasks::new(self, Which::Processes)? {
                match task {
                    Ok(task) if task.pid == pid => return Ok(task),
                    Ok(_) => {}
                    // It may be the one.
                    Err(error) => lost = lost.or(Some(error)),
                }
            }
            Err(lost.unwrap_or(KernelError::NoProcess { pid }))
        };
        let mut found = find();
        for _ in 1..TRIES {
            if found.is_ok() {
                break;
            }
            found = find();
        }
        found
    }

    /// The address space of a process. Page table isolation makes no difference: the kernel's
    /// tables have all that is the process's.
    ///
    /// # Errors
    /// [`KernelError::NoMemory`], [`KernelError::Read`].
    pub fn space_of(&self, task: &Task) -> Result<Space<'m>, KernelError> {
        let mm = self.memory_of(task)?.ok_or(KernelError::NoMemory { pid: task.pid })?;
        self.process_space(self.read_u64(mm.wrapping_add(self.offset("mm_struct", "pgd")?))?)
    }

    /// Where the `struct mm_struct` of a process is.
    fn memory_of(&self, task: &Task) -> Result<Option<u64>, KernelError> {
        let mm = self.read_u64(task.gva.wrapping_add(self.offset("task_struct", "mm")?))?;
        Ok(Some(mm).filter(|mm| *mm != 0 && !task.is_kernel))
    }
}

/// The namespaces of a process, by the inode numbers that /proc/PID/ns shows. What a process that
/// ends has no longer, or the kernel was built without, is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Roots of control groups.
    pub cgroup: Option<u32>,
    /// System V and POSIX message queues.
    pub ipc: Option<u32>,
    /// Mounts.
    pub mnt: Option<u32>,
    /// Network.
    pub net: Option<u32>,
    /// Process ids.
    pub pid: Option<u32>,
    /// Clocks.
    pub time: Option<u32>,
    /// Users and groups.
    pub user: Option<u32>,
    /// Names of the machine.
    pub uts: Option<u32>,
}

/// Where everything is, for all processes.
#[derive(Debug)]
pub struct Details<'a> {
    kernel: &'a Kernel<'a>,
    paths: Paths<'a>,
    exe_file: u64,
    f_path: (u64, u64),
    environment: (u64, u64),
    nsproxy: u64,
    /// References to the proxy, which has one as long as it is used.
    count: Option<u64>,
    /// In the proxy, and the number in the namespace: of cgroup, ipc, mnt, net, time, uts.
    proxied: [Option<(u64, u64)>; 6],
    cred: u64,
    user: Option<(u64, u64)>,
    pid: Option<PidNamespace>,
    budget: Budget,
}

/// Where a task's namespace of process ids is.
#[derive(Debug)]
struct PidNamespace {
    thread_pid: u64,
    level: u64,
    numbers: u64,
    upid: u64,
    ns: u64,
    inum: u64,
}

impl<'a> Details<'a> {
    /// Looks up where a kernel keeps all this.
    ///
    /// # Errors
    /// [`KernelError`]: its types lack something.
    pub fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let mm = |member| kernel.offset("mm_struct", member);
        let at = |structure, member| kernel.offset(structure, member).ok();
        let proxied = |member, structure| Some((at("nsproxy", member)?, at(structure, "ns.inum")?));
        let pid = || {
            Some(PidNamespace {
                thread_pid: at("task_struct", "thread_pid")?,
                level: at("pid", "level")?,
                numbers: at("pid", "numbers")?,
                upid: kernel.size_of("upid").ok()?,
                ns: at("upid", "ns")?,
                inum: at("pid_namespace", "ns.inum")?,
            })
        };
        Ok(Self {
            kernel,
            paths: Paths::new(kernel)?,
            exe_file: mm("exe_file")?,
            f_path: (kernel.offset("file", "f_path.mnt")?, kernel.offset("file", "f_path.dentry")?),
            environment: (mm("env_start")?, mm("env_end")?),
            nsproxy: kernel.offset("task_struct", "nsproxy")?,
            count: at("nsproxy", "count"),
            proxied: [
                proxied("cgroup_ns", "cgroup_namespace"),
                proxied("ipc_ns", "ipc_namespace"),
                proxied("mnt_ns", "mnt_namespace"),
                proxied("net_ns", "net"),
                proxied("time_ns", "time_namespace"),
                proxied("uts_ns", "uts_namespace"),
            ],
            cred: kernel.offset("task_struct", "cred")?,
            user: at("cred", "user_ns").zip(at("user_namespace", "ns.inum")),
            pid: pid(),
            budget: Budget::new(LISTING, LIMIT),
        })
    }

    /// The same with another limit, in bytes, of what programs and environments of all processes
    /// take.
    #[must_use]
    pub fn with_limit(self, bytes: usize) -> Self {
        Self { budget: Budget::new(bytes, LIMIT), ..self }
    }

    /// The program that a process runs, as /proc/PID/exe shows it; `None` for a process without
    /// memory, or whose memory is not a program's.
    ///
    /// # Errors
    /// [`KernelError`]; [`KernelError::TooMuch`] where programs and environments of all processes
    /// so far take more than 1 GiB.
    pub fn executable(&self, task: &Task) -> Result<Option<FilePath>, KernelError> {
        let Some(mm) = self.kernel.memory_of(task)? else { return Ok(None) };
        let file = self.word(mm, self.exe_file)?;
        if file == 0 {
            return Ok(None);
        }
        let (mnt, dentry) = self.f_path;
        let path = self.paths.of(self.word(file, mnt)?, self.word(file, dentry)?)?;
        self.budget.take(path.text.len())?;
        Ok(Some(path))
    }

    /// The environment that a process was started with, as far as it is in memory; the process may
    /// have written over it.
    ///
    /// # Errors
    /// [`KernelError`]; [`KernelError::TooMuch`] where programs and environments of all processes
    /// so far take more than 1 GiB.
    pub fn environment(&self, task: &Task) -> Result<Args, KernelError> {
        let Some(mm) = self.kernel.memory_of(task)? else { return Ok(Args::default()) };
        let (start, end) = self.environment;
        let (start, end) = (self.word(mm, start)?, self.word(mm, end)?);
        let len = end.saturating_sub(start);
        let bytes = self.kernel.space_of(task)?.read_some(start, len.min(MAX_ENVIRONMENT));
        let args = Args::new(&bytes, (bytes.len() as u64) < len);
        self.budget.take(args.size())?;
        Ok(args)
    }

    /// The namespaces that a process is in.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn namespaces(&self, task: &Task) -> Result<Namespaces, KernelError> {
        let proxy = self.word(task.gva, self.nsproxy)?;
        if let Some(count) = self.count.filter(|_| proxy != 0)
            && self.kernel.read_u32(proxy.wrapping_add(count))? == 0
        {
            return Err(KernelError::Malformed {
                what: "the namespaces of a process".to_owned(),
                gva: proxy,
            });
        }
        let number = |base: u64, place: Option<(u64, u64)>| {
            let Some((at, inum)) = place.filter(|_| base != 0) else { return Ok(None) };
            self.inum(self.word(base, at)?, inum)
        };
        let [cgroup, ipc, mnt, net, time, uts] = self.proxied.map(|place| number(proxy, place));
        Ok(Namespaces {
            cgroup: cgroup?,
            ipc: ipc?,
            mnt: mnt?,
            net: net?,
            pid: self.pid_namespace(task)?,
            time: time?,
            user: number(self.word(task.gva, self.cred)?, self.user)?,
            uts: uts?,
        })
    }

    fn pid_namespace(&self, task: &Task) -> Result<Option<u32>, KernelError> {
        let Some(at) = &self.pid else { return Ok(None) };
        let pid = self.word(task.gva, at.thread_pid)?;
        if pid == 0 {
            return Ok(None);
        }
        let level = self.kernel.read_u32(pid.wrapping_add(at.level))?;
        if level > MAX_LEVEL {
            return Err(KernelError::Malformed {
                what: "the depth of process ids".to_owned(),
                gva: pid,
            });
        }
        let upid = pid.wrapping_add(at.numbers).wrapping_add(at.upid.wrapping_mul(level.into()));
        self.inum(self.word(upid, at.ns)?, at.inum)
    }

    fn inum(&self, namespace: u64, at: u64) -> Result<Option<u32>, KernelError> {
        if namespace == 0 {
            return Ok(None);
        }
        let number = self.kernel.read_u32(namespace.wrapping_add(at))?;
        let malformed = || KernelError::Malformed {
            what: "the number of a namespace".to_owned(),
            gva: namespace,
        };
        Some(number).filter(|number| *number >= FIRST_NAMESPACE).map(Some).ok_or_else(malformed)
    }

    fn word(&self, base: u64, at: u64) -> Result<u64, KernelError> {
        self.kernel.read_u64(base.wrapping_add(at))
    }
}
