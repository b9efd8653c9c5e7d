// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths of files, from a directory entry up to the root of its mounts (d_path() of the kernel).

use crate::bytes::text;
use crate::kernel::{Kernel, KernelError};

/// The most entries and mounts that a path leads through, and its longest name.
const MAX_STEPS: usize = 4096;
const MAX_NAME: u32 = 255;

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
    /// From the root of all mounts of its namespace; `pipe:[INODE]` and the like for what has none. What is not UTF-8 is replaced;
    /// control characters may be there.
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

impl<'a> Paths<'a> {
    pub(crate) fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let dentry = |member| kernel.offset("dentry", member);
        let mount = |member| kernel.offset("mount", member);
        Ok(Self {
            kernel,
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

    /// The path of an entry in a mount: `vfsmount` and `dentry` of a `struct path`.
    pub(crate) fn of(&self, vfsmount: u64, dentry: u64) -> Result<FilePath, KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let is_root = word(dentry, self.d_parent)? == dentry;
        let magic = word(word(dentry, self.d_sb)?, self.s_magic)?;
        let plain = |text: String| Ok(FilePath { text, is_deleted: false });
        let inode = || word(word(dentry, self.d_inode)?, self.i_ino);
        match magic {
            PIPES => return plain(format!("pipe:[{}]", inode()?)),
            SOCKETS => return plain(format!("socket:[{}]", inode()?)),
            ANONYMOUS => return plain(format!("anon_inode:{}", self.name(dentry)?)),
            _ => {}
        }
        let is_deleted = !is_root && word(dentry, self.d_pprev)? == 0;
        let mut mount = vfsmount.wrapping_sub(self.mnt);
        let (mut at, mut names, mut len) = (dentry, Vec::new(), 0);
        for _ in 0..MAX_STEPS {
            if at == word(mount, self.mnt_root)? {
                let parent = word(mount, self.mnt_parent)?;
                if parent == mount {
                    names.reverse();
                    return Ok(FilePath { text: format!("/{}", names.join("/")), is_deleted });
                }
                (at, mount) = (word(mount, self.mnt_mountpoint)?, parent);
                continue;
            }
            let name = self.name(at)?;
            len += name.len() + 1;
            names.push(name);
            let parent = word(at, self.d_parent)?;
            if parent == at {
                // What a file system has for itself, such as a memfd.
                names.reverse();
                return Ok(FilePath { text: format!("/{}", names.join("/")), is_deleted: true });
            }
            if len > MAX_PATH {
                break;
            }
            at = parent;
        }
        Err(KernelError::Malformed { what: "the path of the entry".to_owned(), gva: dentry })
    }

    fn name(&self, dentry: u64) -> Result<String, KernelError> {
        let len = self.kernel.read_u32(dentry.wrapping_add(self.d_name_len))?.min(MAX_NAME);
        let name = self.kernel.read_u64(dentry.wrapping_add(self.d_name))?;
        Ok(text(&self.kernel.read_cstr(name, usize::try_from(len).unwrap_or(0))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_named_like_a_socket_is_none() {
        let socket = |text: &str| FilePath { text: text.to_owned(), is_deleted: false }.socket();
        assert_eq!(socket("socket:[370]"), Some(370));
        assert_eq!(["/socket:[370]", "pipe:[370]", "socket:[x]", "socket:[3"].map(socket), [None; 4]);
    }
}
