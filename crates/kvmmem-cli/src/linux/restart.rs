// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Check that a guest was not restarted while a verb read it: what makes sense by itself may then
//! mix two boots. Every verb that finds a kernel, or reads by the page tables of a process, ends
//! with it.

use anyhow::Result;
use kvmmem::view::View;
use kvmmem_linux::Kernel;

use crate::failure;
use crate::input::InputMemory;
use crate::target_run::TargetRun;

/// Exit code where the guest was restarted while it was read.
const RESTARTED: u8 = 4;

/// A guest that is about to be read.
pub(crate) struct RestartCheck<'v> {
    /// How errors name it.
    name: String,
    /// A dump file does not change.
    is_live: bool,
    target: Option<(&'v View, TargetRun)>,
}

impl<'v> RestartCheck<'v> {
    /// To be called before anything is read.
    pub(crate) fn begin(opened: &'v InputMemory) -> Result<Self> {
        let target = opened.view().map(|view| Ok::<_, anyhow::Error>((view, TargetRun::of(view)?)));
        let target = target.transpose()?;
        Ok(Self { name: opened.name(), is_live: target.is_some(), target })
    }

    /// Fails with an exit code of its own where the guest was restarted: the target was reset, or
    /// `kernel`, which was found in it, is gone.
    pub(crate) fn check(&self, kernel: Option<&Kernel<'_>>) -> Result<()> {
        let was_reset = self.target.as_ref().map(|(view, run)| run.was_reset(view)).transpose();
        let is_gone =
            || self.is_live && kernel.is_some_and(|it| matches!(it.is_in_memory(), Ok(false)));
        if matches!(was_reset, Ok(Some(true))) || is_gone() {
            let restarted = "the guest was restarted while it was read: run the command again";
            return Err(failure::exit(RESTARTED, format!("{}: {restarted}", self.name)));
        }
        was_reset.map(drop)
    }

    /// The result of reading, unless the guest was restarted meanwhile: an error of reading counts
    /// for nothing then, either.
    pub(crate) fn settle<R>(&self, kernel: Option<&Kernel<'_>>, result: Result<R>) -> Result<R> {
        match (self.check(kernel), result) {
            (Err(error), Err(_)) if failure::exit_code(&error) == Some(RESTARTED) => Err(error),
            (Err(error), Ok(_)) => Err(error),
            (_, result) => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;
    use kvmmem_linux::Find;

    use super::super::common::{self, Guest, PAGE_TABLES, Place};
    use super::*;

    #[test]
    fn a_guest_that_is_restarted_while_it_is_read_is_one_clear_line() {
        let Place { gpa, .. } = Place::FIRST;
        let guest = Guest::with(&[Place::FIRST]);
        let check = |is_live| RestartCheck { name: "web-1".to_owned(), is_live, target: None };
        for fails in [true, false] {
            guest.put(0, &vec![0; common::RAM]);
            guest.boot(&Place::FIRST);
            let kernel = Kernel::find(&guest, Find::default()).unwrap();
            let result = || if fails { bail!("garbage") } else { Ok(7) };
            assert_eq!(check(true).settle(Some(&kernel), result()).ok(), result().ok());
            guest.put(gpa + PAGE_TABLES, &[0; 0x1000]);
            guest.boot(&Place::SECOND);
            let error = check(true).settle(Some(&kernel), result()).unwrap_err();
            assert_eq!(failure::exit_code(&error), Some(RESTARTED));
            let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
            assert_eq!(
                chain,
                ["web-1: the guest was restarted while it was read: run the command again"]
            );
            // A dump file has what it has.
            assert_eq!(check(false).settle(Some(&kernel), result()).ok(), result().ok());
        }
        // Other errors stay what they are.
        let second = Find { note: Some(Place::SECOND.note), ..Find::default() };
        let kernel = Kernel::find(&guest, second).unwrap();
        let other: Result<()> = Err(anyhow::anyhow!("garbage"));
        let error = check(true).settle(Some(&kernel), other).unwrap_err();
        assert_eq!(error.to_string(), "garbage");
    }
}
