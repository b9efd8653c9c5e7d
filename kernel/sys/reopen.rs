// SPDX-License-Identifier: GPL-2.0-only
//! Device that is opened once more, as `file_clone_open()` does. C header: `include/linux/fs.h`.

use core::ffi::c_int;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::fs::File;
use kernel::prelude::*;
use kernel::sync::aref::ARef;

/// Opens what `file` is a file of, for reading and writing.
pub(crate) fn open_again(file: &File) -> Result<ARef<File>> {
    let file = file.as_ptr();
    // SAFETY: an open file has a path and credentials, which do not change while it is open. The
    // caller's reference keeps it open during the call.
    let opened = from_err_ptr(unsafe {
        let path = &raw const (*file).__bindgen_anon_1.f_path;
        bindings::dentry_open(path, bindings::O_RDWR as c_int, (*file).f_cred)
    })?;
    let opened = NonNull::new(opened.cast::<File>()).ok_or(ENOMEM)?;
    // SAFETY: `dentry_open` returned the file with a count of its own, which this value takes. No
    // descriptor leads to the file, so no thread holds its position.
    Ok(unsafe { ARef::from_raw(opened) })
}
