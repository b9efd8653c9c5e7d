// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's side under load, and its command line.

use anyhow::Result;
use kvmmem_guest::Command;

use crate::raw::errno;
use crate::report::Report;
use crate::wait::PATIENCE;
use crate::world::{CLI, TARGET, World};

pub(crate) fn flood(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut flooder = world.raw()?;
    let mut tool = world.raw()?;
    let (bad_device, device) = (flooder.open()?, tool.open()?);
    let (bad_page, page) = (flooder.page()?, tool.page()?);
    let mut wrong = 0;
    for round in 0..200u64 {
        let seen = errno(flooder.map(&bad_device, &bad_page, round << 12, [round, 1, 2, 3])?);
        wrong += usize::from(seen != "ENOENT");
    }
    report.equal("200 forged tokens are refused as unknown", &wrong, &0);
    let token = world.token()?;
    report.equal(
        "another tool maps meanwhile",
        &errno(tool.map(&device, &page, gpa, token)?),
        &"0".into(),
    );
    report.equal("and undoes it", &errno(tool.unmap(&device, &page)?), &"0".into());
    report.check("the target is not disturbed", world.target_mut()?.process.is_running(), "");
    Ok(())
}

pub(crate) fn cli(world: &mut World, report: &mut Report) -> Result<()> {
    let listing = world.kvmmem(&["target", "list"])?;
    report.check("target list has the target", listing.contains(TARGET), "");
    let unknown = world.try_kvmmem(&["hook", "add", "nobody", "vsock:4:9999"])?;
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    report.check(
        "hook of an unknown target names it",
        !unknown.status.success() && text.contains("nobody"),
        text.trim(),
    );

    let gpa = world.gpa()?;
    let marker = world.marker()?.hex.clone();
    for verb in ["read", "map"] {
        let port = world.hook_port()?;
        let mut command = Command::new(CLI).as_member().memlock(1 << 20);
        command = command.args([
            verb,
            &format!("{gpa:#x}"),
            "--listen",
            &format!("vsock:{port}"),
            "--json",
        ]);
        if verb == "read" {
            command = command.arg("32");
        }
        let output = world.agent()?.run(&command, PATIENCE)?;
        report.check(
            format!("kvmmem {verb} in the introspector shows the marker"),
            output.status.success() && output.text().contains(&marker),
            output.error_text().trim(),
        );
        world.unhook_port(port)?;
    }
    let doctor = world.agent()?.run(&Command::new(CLI).as_member().arg("doctor"), PATIENCE)?;
    report.check(
        "kvmmem doctor runs in the introspector",
        !doctor.stdout.is_empty(),
        doctor.status,
    );
    let wrong = world.agent()?.run(&Command::new(CLI).args(["read", "zebra", "16"]), PATIENCE)?;
    report.check(
        "a number that is none is named",
        !wrong.status.success() && wrong.error_text().contains("zebra"),
        wrong.error_text().trim(),
    );
    Ok(())
}
