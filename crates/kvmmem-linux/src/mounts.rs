// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounts that a process sees, as /proc/PID/mountinfo shows them.
//!
//! The mounts of a namespace form a list, `mnt_namespace.list`, before Linux 6.8, and a red-black
//! tree, `mnt_namespace.mounts`, from then on. What does not lie below the process's root is left
//! out.

use crate::bytes::text;
use crate::kernel::{Kernel, KernelError};
use crate::paths::Paths;
use crate::tasks::Task;

/// Limit of a namespace's mounts. Linux allows 100,000 unless `fs.mount-max` is set.
const MAX_MOUNTS: usize = 1 << 17;

/// The most bytes of their paths.
const MAX_PATHS: usize = 64 << 20;

/// The longest name of a type, and of what is mounted.
const MAX_NAME: usize = 4096;

/// Walks of mounts that change.
const TRIES: u32 = 3;

/// Bits of `vfsmount.mnt_flags`, by the option of mount(8) that sets each.
const OPTIONS: [(u32, &str); 7] = [
    (0x01, "nosuid"),
    (0x02, "nodev"),
    (0x04, "noexec"),
    (0x08, "noatime"),
    (0x10, "nodiratime"),
    (0x20, "relatime"),
    (0x80, "nosymfollow"),
];
const MNT_READONLY: u32 = 0x40;
/// No mount: marks how far a reader of mountinfo has come.
const MNT_CURSOR: u32 = 0x1000_0000;

/// `super_block.s_flags`.
const SB_RDONLY: u64 = 1;

/// Bits of a device's number (`MINORBITS`).
const MINOR_BITS: u32 = 20;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id, and that of the mount that it lies on.
    pub id: u32,
    /// The same.
    pub parent: u32,
    /// Device of the file system.
    pub major: u32,
    /// The same.
    pub minor: u32,
    /// The folder of the file system that is mounted.
    pub root: String,
    /// Where, from the process's root.
    pub point: String,
    /// Whether this mount forbids stores.
    pub is_read_only: bool,
    /// Its other options.
    pub options: Vec<&'static str>,
    /// Type of the file system.
    pub kind: String,
    /// What is mounted: a device, or any text.
    pub source: String,
    /// Whether all mounts of this file system forbid stores.
    pub is_super_read_only: bool,
}

/// The mounts that a process sees, in the kernel's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable {
    /// The mounts.
    pub mounts: Vec<Mount>,
    /// How many cannot be read, as far as the kernel counts them.
    pub lost: usize,
}

/// Where everything is.
#[derive(Debug)]
pub struct Mounts<'a> {
    kernel: &'a Kernel<'a>,
    paths: Paths<'a>,
    nsproxy: u64,
    mnt_ns: u64,
    fs: u64,
    fs_root: (u64, u64),
    place: Place,
    /// How many mounts a namespace has, by its own count.
    count: Option<u64>,
    id: u64,
    parent: u64,
    devname: u64,
    vfsmount: u64,
    root: u64,
    sb: u64,
    flags: u64,
    s_dev: u64,
    s_flags: u64,
    s_type: u64,
    s_subtype: Option<u64>,
    type_name: u64,
}

/// Where a namespace has its mounts, and a mount its node.
#[derive(Debug)]
enum Place {
    List { head: u64, node: u64 },
    Tree { root: u64, node: u64 },
}

impl<'a> Mounts<'a> {
    /// Looks up where a kernel keeps mounts.
    ///
    /// # Errors
    /// [`KernelError`]: its types lack something.
    pub fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let task = |member| kernel.offset("task_struct", member);
        let namespace = |member| kernel.offset("mnt_namespace", member);
        let mount = |member| kernel.offset("mount", member);
        let sb = |member| kernel.offset("super_block", member);
        let root = |member| kernel.offset("fs_struct", member);
        let place = match mount("mnt_node") {
            Ok(node) => Place::Tree { root: namespace("mounts")?, node },
            Err(_) => Place::List { head: namespace("list")?, node: mount("mnt_list")? },
        };
        Ok(Self {
            kernel,
            paths: Paths::new(kernel)?,
            nsproxy: task("nsproxy")?,
            mnt_ns: kernel.offset("nsproxy", "mnt_ns")?,
            fs: task("fs")?,
            fs_root: (root("root.mnt")?, root("root.dentry")?),
            place,
            count: namespace("nr_mounts").or_else(|_| namespace("mounts")).ok(),
            id: mount("mnt_id")?,
            parent: mount("mnt_parent")?,
            devname: mount("mnt_devname")?,
            vfsmount: mount("mnt")?,
            root: mount("mnt.mnt_root")?,
            sb: mount("mnt.mnt_sb")?,
            flags: mount("mnt.mnt_flags")?,
            s_dev: sb("s_dev")?,
            s_flags: sb("s_flags")?,
            s_type: sb("s_type")?,
            s_subtype: sb("s_subtype").ok(),
            type_name: kernel.offset("file_system_type", "name")?,
        })
    }

    /// The mounts that a process sees; none of one that has ended.
    ///
    /// # Errors
    /// [`KernelError`]: the list of mounts cannot be found, or no mount of it can be read.
    pub fn of(&self, task: &Task) -> Result<MountTable, KernelError> {
        let mut result = self.read(task);
        for _ in 1..TRIES {
            match &result {
                Ok(table) if table.lost == 0 => break,
                Ok(_) => result = self.read(task),
                Err(error) if error.is_final() => break,
                Err(_) => result = self.read(task),
            }
        }
        result
    }

    fn read(&self, task: &Task) -> Result<MountTable, KernelError> {
        let (proxy, fs) = (self.word(task.gva, self.nsproxy)?, self.word(task.gva, self.fs)?);
        if proxy == 0 || fs == 0 {
            return Ok(MountTable::default());
        }
        let namespace = self.word(proxy, self.mnt_ns)?;
        let (mnt, dentry) = self.fs_root;
        let root = (self.word(fs, mnt)?, self.word(fs, dentry)?);
        let (nodes, mut error) = self.nodes(namespace)?;
        // A namespace that is in use has a root.
        if nodes.is_empty() {
            let malformed =
                || KernelError::Malformed { what: "the list of mounts".to_owned(), gva: namespace };
            return Err(error.unwrap_or_else(malformed));
        }
        let count = self.count.and_then(|at| self.kernel.read_u32(namespace.wrapping_add(at)).ok());
        let missing = usize::try_from(count.unwrap_or(0)).unwrap_or(0).saturating_sub(nodes.len());
        let mut table =
            MountTable { mounts: Vec::new(), lost: missing.max(error.is_some().into()) };
        let mut bytes = 0;
        for gva in nodes {
            let mount = match self.mount(gva, root) {
                Ok(Some(mount)) => mount,
                Ok(None) => continue,
                Err(local) if local.is_local() => {
                    table.lost += 1;
                    error = error.or(Some(local));
                    continue;
                }
                Err(error) => return Err(error),
            };
            bytes += mount.root.len() + mount.point.len() + mount.source.len() + mount.kind.len();
            if bytes > MAX_PATHS {
                return Err(KernelError::TooMuch { what: "64 MiB of mounts' paths" });
            }
            table.mounts.push(mount);
        }
        match error {
            Some(error) if table.mounts.is_empty() => Err(error),
            _ => Ok(table),
        }
    }

    /// The mounts of a namespace, and why there are not more if some cannot be found.
    fn nodes(&self, namespace: u64) -> Result<(Vec<u64>, Option<KernelError>), KernelError> {
        match self.place {
            Place::Tree { root, node } => {
                let (nodes, error) =
                    self.kernel.rb_tree(namespace.wrapping_add(root), MAX_MOUNTS)?;
                Ok((nodes.into_iter().map(|at| at.wrapping_sub(node)).collect(), error))
            }
            Place::List { head, node } => {
                let mut list = self.kernel.list(namespace.wrapping_add(head));
                let (mut nodes, mut lost) = (Vec::new(), None);
                while nodes.len() < MAX_MOUNTS {
                    match list.next_with(Ok) {
                        Ok(Some((at, _))) => nodes.push(at.wrapping_sub(node)),
                        Ok(None) => break,
                        Err(error) if error.is_local() => lost = lost.or(Some(error)),
                        Err(error) => return Err(error),
                    }
                }
                Ok((nodes, lost))
            }
        }
    }

    /// The mount at `gva`, unless it does not lie below `root`.
    fn mount(&self, gva: u64, root: (u64, u64)) -> Result<Option<Mount>, KernelError> {
        let number = |base: u64, at: u64| self.kernel.read_u32(base.wrapping_add(at));
        let malformed = |gva| KernelError::Malformed { what: "the mount".to_owned(), gva };
        let name = |gva| match text(&self.kernel.read_cstr(gva, MAX_NAME)?) {
            name if name.is_empty() => Err(malformed(gva)),
            name => Ok(name),
        };
        let flags = number(gva, self.flags)?;
        if flags & MNT_CURSOR != 0 {
            return Ok(None);
        }
        let top = self.word(gva, self.root)?;
        let Some(point) = self.paths.below(gva.wrapping_add(self.vfsmount), top, root)? else {
            return Ok(None);
        };
        let sb = self.word(gva, self.sb)?;
        let dev = number(sb, self.s_dev)?;
        let mut kind = name(self.word(self.word(sb, self.s_type)?, self.type_name)?)?;
        if let Some(subtype) = self.s_subtype {
            let subtype = self.word(sb, subtype)?;
            if subtype != 0 {
                kind = format!("{kind}.{}", name(subtype)?);
            }
        }
        if !kind.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(malformed(sb));
        }
        let source = self.word(gva, self.devname)?;
        Ok(Some(Mount {
            id: number(gva, self.id)?,
            parent: number(self.word(gva, self.parent)?, self.id)?,
            major: dev >> MINOR_BITS,
            minor: dev & ((1 << MINOR_BITS) - 1),
            root: self.paths.within(top)?,
            point,
            is_read_only: flags & MNT_READONLY != 0,
            options: OPTIONS
                .iter()
                .filter(|(bit, _)| flags & bit != 0)
                .map(|(_, name)| *name)
                .collect(),
            kind,
            source: if source == 0 { "none".to_owned() } else { name(source)? },
            is_super_read_only: self.word(sb, self.s_flags)? & SB_RDONLY != 0,
        }))
    }

    fn word(&self, base: u64, at: u64) -> Result<u64, KernelError> {
        self.kernel.read_u64(base.wrapping_add(at))
    }
}
