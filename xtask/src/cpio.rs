// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes cpio archives in the "newc" format, which initramfs are made of
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// An archive being written. All entries belong to root and have no time stamp, so equal content
/// gives equal bytes.
pub(crate) struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0, folders: BTreeSet::new() }
    }

    /// Adds a file with the folders it needs. `path` has no leading slash.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, bytes: &[u8]) -> io::Result<()> {
        let folders: Vec<_> =
            path.match_indices('/').map(|(end, _)| path.split_at(end).0).collect();
        for folder in folders {
            self.folder(folder)?;
        }
        self.entry(path, REGULAR | permissions, bytes)
    }

    /// Adds a file of this machine.
    pub(crate) fn copy(&mut self, path: &str, permissions: u32, from: &Path) -> io::Result<()> {
        let bytes = std::fs::read(from).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", from.display()))
        })?;
        self.file(path, permissions, &bytes)
    }

    /// Writes the end and returns what was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn folder(&mut self, path: &str) -> io::Result<()> {
        if self.folders.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, &[])
        } else {
            Ok(())
        }
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let links = if mode & DIRECTORY == 0 { 1 } else { 2 };
        // inode, mode, uid, gid, links, mtime, size, four device numbers, name size, checksum
        // (unused).
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(bytes)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn align(&mut self) -> io::Result<()> {
        while !self.written.is_multiple_of(4) {
            self.put(&[0])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_itself_reads_the_archive() {
        if !crate::tool::is_installed("cpio") {
            eprintln!("skipped: no cpio: install it (Debian: cpio)");
            return;
        }
        let mut archive = Archive::new(Vec::new());
        archive.file("init", 0o755, b"odd").unwrap();
        archive.file("a/b/file", 0o600, b"1234567").unwrap();
        archive.file("a/b/empty", 0o644, b"").unwrap();
        let bytes = archive.finish().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive");
        std::fs::write(&path, bytes).unwrap();
        let status = std::process::Command::new("cpio")
            .args(["-i", "-d", "--quiet"])
            .stdin(std::fs::File::open(&path).unwrap())
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(std::fs::read(folder.path().join("init")).unwrap(), b"odd");
        assert_eq!(std::fs::read(folder.path().join("a/b/file")).unwrap(), b"1234567");
        assert_eq!(std::fs::read(folder.path().join("a/b/empty")).unwrap(), b"");
    }

    #[test]
    fn a_folder_is_written_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/one", 0o644, b"").unwrap();
        archive.file("a/two", 0o644, b"").unwrap();
        let text = String::from_utf8(archive.finish().unwrap()).unwrap();
        assert_eq!(text.matches("a\0").count(), 1);
    }
}
