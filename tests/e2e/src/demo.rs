// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask demo`: one VM maps another's page, and what is refused.

use std::time::Instant;

use anyhow::Result;

use crate::report::{Report, Style};
use crate::scenarios::{mapping, refusals, views};
use crate::test_bed::TestBed;
use crate::world::World;

pub(crate) fn run() -> Result<u8> {
    let start = Instant::now();
    println!("Booting the broker, a target and an introspector, both stock Debian kernels ...");
    let mut world = World::start(TestBed::from_env()?)?;
    println!(
        "Up after {:.1} s. The target's program put a random marker and a counter at GPA {:#x}.",
        start.elapsed().as_secs_f64(),
        world.gpa()?
    );

    let mut report = Report::new(Style::Text);
    let outcome = acts(&mut world, &mut report);
    if let Err(error) = &outcome {
        report.check("the demo runs to its end", false, format!("{error:#}"));
        report.say(&world.logs());
    }
    println!("\n{:<18} {:<72} {:>10}", "act", "step", "ms");
    for check in report.checks() {
        let mark = if check.ok { "" } else { "  FAILED" };
        let millis = f64::from(u32::try_from(check.micros).unwrap_or(u32::MAX)) / 1e3;
        println!("{:<18} {:<72} {millis:>10.2}{mark}", check.scenario, check.what);
    }
    println!("\ndemo: {} of {} checks passed", report.passed(), report.checks().len());
    Ok(u8::from(report.failed() > 0))
}

fn acts(world: &mut World, report: &mut Report) -> Result<()> {
    report.begin("look", "a member of group kvmmem looks into the target");
    mapping::map_basic(world, report)?;
    report.begin("tokens", "used, wrong and expired tokens");
    refusals::token_rules(world, report)?;
    report.begin("refusals", "each bad request gets its errno");
    refusals::refusals(world, report)?;
    report.begin("views", "a view: attach, scan, watch, and its owner takes it back");
    views::act::act(world, report)?;
    report
        .begin("answers", "the target's processes, modules, log and a YARA match, without symbols");
    views::answers::answers(world, report)
}
