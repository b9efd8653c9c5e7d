// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths of files, from a directory entry up to the root of its mounts (d_path() of the kernel).

use crate::budget::{Budget, LISTING};
use crate::bytes::text;
use crate::kernel::{Kernel, KernelError};

/// The most entries and mounts that a path leads through, and its longest name.
const MAX_STEPS: usize = 4096;
const MAX_NAME: u32 = 255;

/// For errors.
const STEPS: &str = "a billion directories and mounts of all paths, or the limit that was set";

/// The longest path, bytes.
const MAX_PATH: usize = 64 << 10;

/// File systems whose files have no path, by their magic numbers (include/uapi/linux/magic.h).
const PIPES: u64 = 0x5049_5045;
const SOCKETS: u64 = 0x534f_434b;
const ANONYMOUS: u64 = 0x0904_1934;

/// Where everything is.
#[derive(Debug)]
pub(crate) struct Paths<'a> {
    kernel: &'a Kernel<'a>,
    /// Entries and mounts that all paths together may lead through: a mount adds nothing to a path.
    steps: Budget,
    d_parent: u64,
    d_name: u64,
    d_name_len: u64,
    d_pprev: u64,
    d_sb: u64,
    d_inode: u64,
    s_magic: u64,
    i_ino: u64,
    mnt: u64,
    mnt_root: u64,
    mnt_parent: u64,
    mnt_mountpoint: u64,
}

/// A path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilePath {
    /// From the root of all mounts of its namespace; `pipe:[INODE]` and the like for what has
    /// none. What is not UTF-8 is replaced; control characters may be there.
    pub text: String,
    /// Whether its name was removed.
    pub is_deleted: bool,
}

impl FilePath {
    /// The inode of a socket.
    pub fn socket(&self) -> Option<u64> {
        // What has a path begins with a slash.
        self.text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }
}

/// Where a path ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// At the root that was asked for.
    Root,
    /// At the root of all mounts.
    Top,
    /// At the root of a file system that is not mounted there.
    Detached,
}

/// The names of a path, the last one first.
#[derive(Default)]
struct Names {
    names: Vec<String>,
    len: usize,
}

impl Names {
    /// `None` where the path is too long.
    fn push(&mut self, name: String) -> Option<()> {
        self.len += name.len() + 1;
        self.names.push(name);
        (self.len <= MAX_PATH + usize::try_from(MAX_NAME).ok()? && self.names.len() <= MAX_STEPS)
            .then_some(())
    }

    fn path(&self) -> String {
        let names: Vec<&str> = self.names.iter().rev().map(String::as_str).collect();
        format!("/{}", names.join("/"))
    }
}

/// Of a path that has no end, or a longer one than any file has.
fn endless() -> KernelError {
    KernelError::TooMuch { what: "4,096 directories and mounts, or 64 KiB, of a path" }
}

impl<'a> Paths<'a> {
    pub(crate) fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let dentry = |member| kernel.offset("dentry", member);
        let mount = |member| kernel.offset("mount", member);
        Ok(Self {
            kernel,
            steps: Budget::new(LISTING, STEPS),
            d_parent: dentry("d_parent")?,
            d_name: dentry("d_name.name")?,
            d_name_len: dentry("d_name.len")?,
            d_pprev: dentry("d_hash.pprev")?,
            d_sb: dentry("d_sb")?,
            d_inode: dentry("d_inode")?,
            s_magic: kernel.offset("super_block", "s_magic")?,
            i_ino: kernel.offset("inode", "i_ino")?,
            mnt: mount("mnt")?,
            mnt_root: mount("mnt.mnt_root")?,
            mnt_parent: mount("mnt_parent")?,
            mnt_mountpoint: mount("mnt_mountpoint")?,
        })
    }

    /// The same with another limit of steps.
    pub(crate) fn with_limit(self, steps: usize) -> Self {
        Self { steps: Budget::new(steps, STEPS), ..self }
    }

    /// The path of an entry in a mount: `vfsmount` and `dentry` of a `struct path`.
    pub(crate) fn of(&self, vfsmount: u64, dentry: u64) -> Result<FilePath, KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let is_root = word(dentry, self.d_parent)? == dentry;
        let magic = word(word(dentry, self.d_sb)?, self.s_magic)?;
        let plain = |text: String| Ok(FilePath { text, is_deleted: false });
        let inode = || match word(word(dentry, self.d_inode)?, self.i_ino)? {
            0 => {
                Err(KernelError::Malformed { what: "the inode of a file".to_owned(), gva: dentry })
            }
            inode => Ok(inode),
        };
        match magic {
            PIPES => return plain(format!("pipe:[{}]", inode()?)),
            SOCKETS => return plain(format!("socket:[{}]", inode()?)),
            ANONYMOUS => return plain(format!("anon_inode:{}", self.name(dentry)?)),
            _ => {}
        }
        let is_deleted = !is_root && word(dentry, self.d_pprev)? == 0;
        let (text, end) = self.climb(vfsmount, dentry, None)?;
        // What a file system has for itself, such as a memfd, has no name either.
        Ok(FilePath { text, is_deleted: is_deleted || end == End::Detached })
    }

    /// The path from `root`, a `vfsmount` and a `dentry`; `None` for what lies elsewhere.
    pub(crate) fn below(
        &self,
        vfsmount: u64,
        dentry: u64,
        root: (u64, u64),
    ) -> Result<Option<String>, KernelError> {
        let (text, end) = self.climb(vfsmount, dentry, Some(root))?;
        Ok((end == End::Root).then_some(text))
    }

    /// The path of an entry in its own file system.
    pub(crate) fn within(&self, dentry: u64) -> Result<String, KernelError> {
        let mut names = Names::default();
        let mut at = dentry;
        loop {
            self.steps.take(1)?;
            let parent = self.kernel.read_u64(at.wrapping_add(self.d_parent))?;
            if parent == at {
                return Ok(names.path());
            }
            names.push(self.name(at)?).ok_or_else(endless)?;
            at = parent;
        }
    }

    /// The names up to `root`, or to the root of all mounts.
    fn climb(
        &self,
        vfsmount: u64,
        dentry: u64,
        root: Option<(u64, u64)>,
    ) -> Result<(String, End), KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let mut mount = vfsmount.wrapping_sub(self.mnt);
        let (mut at, mut names) = (dentry, Names::default());
        for _ in 0..MAX_STEPS {
            self.steps.take(1)?;
            if root == Some((mount.wrapping_add(self.mnt), at)) {
                return Ok((names.path(), End::Root));
            }
            let top = word(mount, self.mnt_root)?;
            if top == 0 {
                return Err(KernelError::Malformed {
                    what: "the mount of a file".to_owned(),
                    gva: mount,
                });
            }
            if at == top {
                let parent = word(mount, self.mnt_parent)?;
                if parent == mount {
                    return Ok((names.path(), End::Top));
                }
                (at, mount) = (word(mount, self.mnt_mountpoint)?, parent);
                continue;
            }
            names.push(self.name(at)?).ok_or_else(endless)?;
            let parent = word(at, self.d_parent)?;
            if parent == at {
                return Ok((names.path(), End::Detached));
            }
            at = parent;
        }
        Err(endless())
    }

    fn name(&self, dentry: u64) -> Result<String, KernelError> {
        let len = self.kernel.read_u32(dentry.wrapping_add(self.d_name_len))?;
        let name = self.kernel.read_u64(dentry.wrapping_add(self.d_name))?;
        let bytes = self.kernel.read_cstr(name, usize::try_from(len.min(MAX_NAME)).unwrap_or(0))?;
        // A name has the length in the entry, and at least one byte unless it is not shown.
        if u32::try_from(bytes.len()).ok() != Some(len) {
            return Err(KernelError::Malformed {
                what: "the name of a file".to_owned(),
                gva: dentry,
            });
        }
        Ok(text(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_named_like_a_socket_is_none() {
        let socket = |text: &str| FilePath { text: text.to_owned(), is_deleted: false }.socket();
        assert_eq!(socket("socket:[370]"), Some(370));
        assert_eq!(
            ["/socket:[370]", "pipe:[370]", "socket:[x]", "socket:[3"].map(socket),
            [None; 4]
        );
    }
}
