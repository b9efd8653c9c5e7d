// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sandbox of the machine's process, set up before the guest runs. The process maps the memory of
//! whole targets: a guest that breaks out into it should reach nothing else.
//!
//! - no_new_privs: no program that it executes gains rights.
//! - Landlock: only files that a reset opens again, no TCP port, no abstract unix socket, no signal
//!   to another process.
//! - seccomp: system calls that no machine needs ([`calls`]) end the process ([`filter`]), with the
//!   call's number on standard error.
//!
//! Features that the host's kernel lacks are skipped with a warning.

mod calls;
mod filter;

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

use crate::config::VmConfig;
use crate::error::VmmError;
use crate::machine::VSOCK_DEVICE;

pub use calls::{AllowedCall, allowed_calls};

/// What of Landlock is used, where the kernel has it. Later ones restrict connections to unix
/// sockets by path, such as the broker's.
const LANDLOCK: ABI = ABI::V6;

/// A sandbox that was entered: the places that it opens.
pub(crate) struct Sandbox(Vec<PathBuf>);

impl Sandbox {
    /// Gives up what a machine of this configuration does not need. For this thread and those that
    /// it starts; the filter of system calls is for the whole process.
    pub(crate) fn enter(config: &VmConfig) -> Self {
        let places = places(config);
        let allowed = places.iter().map(|(place, _)| place.clone()).collect();
        match restrict_files(places) {
            Ok(RulesetStatus::NotEnforced) => {
                tracing::warn!(
                    "this host's kernel has no Landlock: the sandbox does not restrict files"
                );
            }
            Ok(RulesetStatus::PartiallyEnforced) => {
                tracing::info!("this host's kernel has an older Landlock, which restricts less");
            }
            Ok(RulesetStatus::FullyEnforced) => {}
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn Error,
                    "Landlock failed: the sandbox does not restrict files"
                );
            }
        }
        // Also sets no_new_privs, where Landlock has not.
        if let Err(error) = filter::install() {
            tracing::warn!(
                error = &error as &dyn Error,
                "seccomp failed: the sandbox does not restrict system calls"
            );
        }
        Self(allowed)
    }

    /// Names the sandbox in an error that it may have caused.
    pub(crate) fn explain(&self, error: VmmError) -> VmmError {
        let chain =
            std::iter::successors(Some(&error as &(dyn Error + 'static)), |&error| error.source());
        let mut causes = chain.filter_map(|error| error.downcast_ref::<io::Error>());
        if !causes.any(|cause| cause.kind() == io::ErrorKind::PermissionDenied) {
            return error;
        }
        let allowed: Vec<String> = self.0.iter().map(|place| format!("{place:?}")).collect();
        VmmError::Sandbox { allowed: allowed.join(", "), source: Box::new(error) }
    }
}

fn restrict_files(
    places: Vec<(PathBuf, BitFlags<AccessFs>)>,
) -> Result<RulesetStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    for (place, access) in places {
        rules = rules.add_rules(path_beneath_rules([place], access))?;
    }
    Ok(rules.restrict_self()?.ruleset)
}

/// What a reset opens again, and how.
fn places(config: &VmConfig) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
    let write = read | AccessFs::WriteFile | AccessFs::IoctlDev;
    let images =
        std::iter::once(&config.kernel).chain(&config.initrd).map(|path| (place(path), read));
    let disks = config.disks.iter().map(|disk| match disk.read_only {
        true => (place(&disk.path), read),
        // Its folder may hold files that the guest must not change, and no update puts another one
        // in its place.
        false => (real(&disk.path), write),
    });
    let vsock = config.cid.map(|_| (PathBuf::from(VSOCK_DEVICE), write));
    images.chain(disks).chain(vsock).collect()
}

/// Where a file can be opened again: its folder, for an update may put another file in its place; a
/// device is itself.
fn place(path: &Path) -> PathBuf {
    let path = real(path);
    let is_device = fs::metadata(&path)
        .is_ok_and(|file| file.file_type().is_block_device() || file.file_type().is_char_device());
    match path.parent() {
        Some(folder) if !is_device => folder.to_owned(),
        _ => path,
    }
}

fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}
