// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bad requests: each gets its errno, and nothing is lost.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::raw::errno;
use crate::report::Report;
use crate::wait;
use crate::world::World;

/// How long a token by KVMI lives.
const LIFETIME: Duration = Duration::from_secs(3);

/// How many tokens of one target may wait.
const OUTSTANDING: usize = 64;

pub(crate) fn token_rules(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let (page, other) = (tool.page()?, tool.page()?);

    let token = world.token()?;
    report.equal("a fresh token maps", &errno(tool.map(&device, &page, gpa, token)?), &"0".into());
    report.equal(
        "a used token is refused",
        &errno(tool.map(&device, &other, gpa, token)?),
        &"ENOENT".into(),
    );

    let mut wrong = world.token()?;
    wrong[3] ^= 1;
    report.equal(
        "a wrong token is refused",
        &errno(tool.map(&device, &other, gpa, wrong)?),
        &"ENOENT".into(),
    );

    // The first waiting token is the first to expire: there is room for another one then.
    let start = Instant::now();
    let old = world.kvmi_token()?;
    let mut given = 1;
    let refused = loop {
        match world.session()?.map_token() {
            Ok(_) if given < 2 * OUTSTANDING => given += 1,
            Ok(_) => break "never".to_owned(),
            Err(error) => break format!("{error}"),
        }
    };
    // Where giving them takes longer than they live, more than so many can be given.
    let is_right = given == OUTSTANDING || given > OUTSTANDING && start.elapsed() >= LIFETIME;
    report.check("no more than 64 tokens wait", is_right, format!("{given}, then: {refused}"));
    let again = wait::until(|| Ok(world.kvmi_token().is_ok()))?;
    report.check("a token is given again once one has expired", again, "");
    report.check(
        "which takes three seconds",
        start.elapsed() >= LIFETIME,
        format!("{:?}", start.elapsed()),
    );
    report.equal(
        "the expired token is refused",
        &errno(tool.map(&device, &other, gpa, old)?),
        &"ENOENT".into(),
    );

    report.equal("the mapping is undone", &errno(tool.unmap(&device, &page)?), &"0".into());
    report.check("a page of zeros is left", tool.is_zero(&page)?, "");
    Ok(())
}

pub(crate) fn refusals(world: &mut World, report: &mut Report) -> Result<()> {
    let gpa = world.gpa()?;
    let beyond = world.max_gfn()? << 12;
    let mut tool = world.raw()?;
    let device = tool.open()?;
    let page = tool.page()?;
    let before = tool.read(&page)?;

    for (what, kind, wanted) in [
        ("a page of a file is refused", "file", "EINVAL"),
        ("a shared page is refused", "shared", "EINVAL"),
        ("a read-only page is refused", "readonly", "EINVAL"),
        ("an address without memory is refused", "hole", "EFAULT"),
    ] {
        let bad = tool.must(&format!("page {kind}"))?;
        let token = world.token()?;
        report.equal(what, &errno(tool.map(&device, &bad, gpa, token)?), &wanted.into());
    }
    for (what, address) in [
        ("an unaligned gva is refused", format!("{page}+8")),
        ("a kernel address as gva is refused", "0xffff888000001000".to_owned()),
    ] {
        let address = match address.split_once('+') {
            Some((base, more)) => add(base, more)?,
            None => address,
        };
        let token = world.token()?;
        let seen = errno(tool.map(&device, &address, gpa, token)?);
        report.check(what, seen == "EINVAL" || seen == "EFAULT", seen);
    }
    let token = world.token()?;
    report.equal(
        "an unaligned gpa is refused",
        &errno(tool.map(&device, &page, gpa + 8, token)?),
        &"EINVAL".into(),
    );
    for (what, hole) in [
        ("a gpa past the target's memory is refused", beyond),
        ("the PCI hole is refused", 0xe000_0000),
    ] {
        let token = world.token()?;
        report.equal(what, &errno(tool.map(&device, &page, hole, token)?), &"EFAULT".into());
    }
    report.equal(
        "UNMAP of what is not mapped is refused",
        &errno(tool.unmap(&device, &page)?),
        &"ENOENT".into(),
    );
    report.equal(
        "an argument that cannot be read is refused",
        &errno(tool.ask(&format!("ioctl {device} 0x40306901 0x10"))?),
        &"EFAULT".into(),
    );
    for number in ["0", "0x40306902", "0x40046902", "0xffffffff"] {
        let seen = errno(tool.ask(&format!("ioctl {device} {number} 0"))?);
        report.equal(format!("ioctl {number} is unknown"), &seen, &"ENOTTY".into());
    }
    report.check("the tool's page is as it was", tool.read(&page)? == before, "");

    let token = world.token()?;
    report.equal(
        "after all that a right request works",
        &errno(tool.map(&device, &page, gpa, token)?),
        &"0".into(),
    );
    let token = world.token()?;
    report.equal(
        "a gva in use is refused",
        &errno(tool.map(&device, &page, gpa, token)?),
        &"EALREADY".into(),
    );
    let marker = world.marker()?.hex.clone();
    report.check(
        "the first mapping is not hurt by that",
        tool.read(&page)?.starts_with(&marker),
        "",
    );
    report.equal("it is undone", &errno(tool.unmap(&device, &page)?), &"0".into());

    let mut other_user = world.raw_as(|command| command.as_other_user())?;
    report.equal(
        "who is not in group kvmmem cannot open",
        &errno(other_user.ask("open")?),
        &"EACCES".into(),
    );
    Ok(())
}

/// `base + more`, both as the raw tool writes numbers.
fn add(base: &str, more: &str) -> Result<String> {
    let base = u64::from_str_radix(base.trim_start_matches("0x"), 16)?;
    Ok(format!("{:#x}", base + more.parse::<u64>()?))
}
