// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernel modules.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::system::{delete_module, finit_module};

/// Folder of the modules to load at boot.
const FOLDER: &str = "/modules";

/// O_NONBLOCK: fail with EAGAIN rather than wait while the module is in use.
const NONBLOCK: i32 = 0o4000;

/// Loads a plain `.ko` file; one that is loaded already is fine.
///
/// # Errors
/// As `finit_module(2)`'s.
pub fn load(path: &Path, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    match finit_module(File::open(path)?, &parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Unloads a module.
///
/// # Errors
/// As `delete_module(2)`'s: EAGAIN or EBUSY while it is in use.
pub fn unload(name: &str) -> io::Result<()> {
    Ok(delete_module(&CString::new(name)?, NONBLOCK)?)
}

/// Loads what `/modules/order` lists: one file name a line, parameters after a blank, `?` before
/// one that may fail.
///
/// # Errors
/// When one that may not fail does.
pub fn load_all() -> io::Result<()> {
    let order = match fs::read_to_string(Path::new(FOLDER).join("order")) {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for line in order.lines().filter(|line| !line.is_empty()) {
        let (optional, line) = line.strip_prefix('?').map_or((false, line), |rest| (true, rest));
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        if let Err(error) = load(&Path::new(FOLDER).join(name), parameters) {
            if !optional {
                return Err(io::Error::new(error.kind(), format!("module {name}: {error}")));
            }
            println!("kvmmem-guest: optional module {name}: {error}");
        }
    }
    Ok(())
}
