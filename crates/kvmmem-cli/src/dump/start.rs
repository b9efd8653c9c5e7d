// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of a dump before its token is used.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};

use super::arguments::Arguments;
use super::checkpoint::Checkpoint;
use super::path::{self, Kind};
use super::record::SavedRecord;

/// What is there of a dump before its token is used.
pub(super) enum Start {
    /// Nothing: the file is made once there is something to write.
    New,
    Stream(File),
    /// A dump to continue.
    Unfinished(Box<Checkpoint>, File),
    /// A dump that is complete, record and all; only its checkpoint is left to be removed.
    Complete(SavedRecord),
}

impl Start {
    /// Opens a stream or what is there of an earlier dump; checks that there can be a new file.
    pub(super) fn open(arguments: &Arguments) -> Result<Self> {
        let file = arguments.file.display();
        if path::kind(&arguments.file)? == Kind::Stream {
            ensure!(!arguments.resume, "{file} is a stream: what it has got cannot be resumed");
            if let Some(record) = &arguments.record {
                path::check_new(record)?;
            }
            return Ok(Self::Stream(path::open_stream(&arguments.file)?));
        }
        let earlier = Checkpoint::load(&arguments.file)?;
        let exists =
            arguments.file.try_exists().with_context(|| format!("cannot look for {file}"))?;
        match (&earlier, arguments.resume, exists) {
            (Some(_), false, _) => {
                bail!(
                    "{file} is an unfinished dump: go on with --resume, or remove it and {file}.part"
                )
            }
            (None, false, true) => bail!("{file} exists: remove it, or choose another name"),
            (None, true, true) => {
                bail!(
                    "{file} cannot be resumed: there is no {file}.part, so it is complete or no dump"
                )
            }
            (Some(_), true, false) => {
                bail!("{file} is gone, only {file}.part is left: remove that, and begin again")
            }
            (Some(_), true, true) | (None, _, false) => {}
        }
        let record = arguments.record_path().unwrap_or_default();
        ensure!(record != arguments.file, "--record names the file of the dump itself");
        let Some(checkpoint) = earlier else {
            path::check_new(&arguments.file)?;
            path::check_new(&record)?;
            return Ok(Self::New);
        };
        let opened = path::open_file(&arguments.file)?;
        let len =
            arguments.file.metadata().with_context(|| format!("cannot look at {file}"))?.len();
        if let Some(saved) = SavedRecord::load(&record, &checkpoint, len) {
            return Ok(Self::Complete(saved));
        }
        path::check_new(&record)?;
        Ok(Self::Unfinished(Box::new(checkpoint), opened))
    }
}
