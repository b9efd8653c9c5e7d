// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a grant allows, and to whom.

use anyhow::{Context, Result, ensure};
use kvmmem_client::admin::{GrantInfo, GrantRequest, GrantState, KvmiPolicy};
use kvmmem_proto::scope::{Rights, Span};
use uuid::Uuid;

use crate::raw::{Raw, errno};
use crate::report::Report;
use crate::wait;
use crate::world::{INTROSPECTOR, TARGET, World};

pub(crate) fn scope(world: &mut World, report: &mut Report) -> Result<()> {
    let gpas = world.marker()?.gpas.clone();
    let (first, last) =
        (*gpas.iter().min().context("no page")?, *gpas.iter().max().context("no page")?);
    let span = |gpa| Span { gpa, len: 0x1000 };
    let low = world.grant(Rights::ReadOnly, Some(vec![span(first)]))?.token.words();
    let high = world.grant(Rights::ReadOnly, Some(vec![span(last)]))?.token.words();
    let (mut one, mut two) = (world.viewer()?, world.viewer()?);
    let (a, b) = (one.view(low)?, two.view(high)?);
    let ranges = one.must(&format!("ranges {a}"))?;
    report.check(
        "the ranges are the grant's",
        ranges.ends_with(&format!("1 {first:#x}+0x1000,")),
        &ranges,
    );
    report.check(
        "each process reads its own",
        one.pread(&a, first, 8)?.is_ok() && two.pread(&b, last, 8)?.is_ok(),
        "",
    );
    report.equal(
        "and nothing before its ranges",
        &errno(two.pread(&b, first, 8)?),
        &"ENXIO".into(),
    );
    report.equal("nor behind them", &one.pread(&a, last, 8)?, &Ok(String::new()));
    report.equal(
        "a mapping outside is refused",
        &errno(two.mmap(&b, first, 0x1000, "r")?),
        &"ENXIO".into(),
    );
    let page = two.must(&format!("mmap {b} {:#x} 0x3000 r shared", last - 0x1000))?;
    report.equal("one that reaches out has a hole", &errno(two.load(&page, 1)?), &"SIGBUS".into());
    let inside = format!("{:#x}", super::use_it::hex(&page)? + 0x1000);
    report.equal("and the target's page", &two.load(&inside, 8)?.is_ok(), &true);
    report.equal(
        "lseek finds the range",
        &two.must(&format!("seek {b} 0 data"))?,
        &format!("{last:#x}"),
    );

    // v1 keeps to the grant as well.
    let mut raw = world.raw()?;
    let (device, page) = (raw.open()?, raw.page()?);
    let token = world.grant(Rights::ReadOnly, None)?.token.words();
    report.equal(
        "MAP needs a grant to write",
        &errno(raw.map(&device, &page, first, token)?),
        &"EPERM".into(),
    );
    let token = world.grant(Rights::ReadWrite, Some(vec![span(first)]))?.token.words();
    report.equal(
        "and one for that page",
        &errno(raw.map(&device, &page, last, token)?),
        &"EFAULT".into(),
    );
    let token = world.grant(Rights::ReadWrite, Some(vec![span(first)]))?.token.words();
    report.equal("with both it maps", &errno(raw.map(&device, &page, first, token)?), &"0".into());
    Ok(())
}

/// How often something is tried for which a token may expire on its way.
const TRIES: usize = 20;

/// Attaches with a fresh token by KVMI, again where it has expired meanwhile: the slot, and the
/// errno.
fn attach_by_kvmi(world: &mut World, tool: &mut Raw) -> Result<(String, String)> {
    let device = tool.open()?;
    let mut seen = String::new();
    for _ in 0..TRIES {
        seen = errno(tool.attach(&device, world.kvmi_token()?)?);
        if seen != "ENOENT" {
            break;
        }
    }
    Ok((device, seen))
}

pub(crate) fn rules(world: &mut World, report: &mut Report) -> Result<()> {
    let mut tool = world.viewer()?;
    let attach = |tool: &mut Raw, token| -> Result<String> {
        let device = tool.open()?;
        Ok(errno(tool.attach(&device, token)?))
    };
    let foreign =
        world.grant_as(|request| GrantRequest { holder: Some(Uuid::from_u128(7)), ..request })?;
    report.equal(
        "a token of another holder is refused",
        &attach(&mut tool, foreign.token.words())?,
        &"ENOENT".into(),
    );
    let own = world.uuid(INTROSPECTOR)?;
    let held = world.grant_as(|request| GrantRequest { holder: Some(own), ..request })?;
    report.equal("the holder attaches", &attach(&mut tool, held.token.words())?, &"0".into());
    let twice = world.grant_as(|request| GrantRequest { uses: 2, ..request })?.token.words();
    let seen = [attach(&mut tool, twice)?, attach(&mut tool, twice)?, attach(&mut tool, twice)?];
    report.equal("two uses are two", &seen, &["0", "0", "ENOENT"].map(str::to_owned));
    let brief = world.grant_as(|request| GrantRequest { ttl_ms: 300, ..request })?;
    let is_active =
        |grant: &GrantInfo| grant.id == brief.grant && grant.state == GrantState::Active;
    let expired = wait::until(|| Ok(!world.admin()?.grants()?.iter().any(is_active)))?;
    report.check("a grant expires", expired, "");
    report.equal(
        "an expired token is refused",
        &attach(&mut tool, brief.token.words())?,
        &"ENOENT".into(),
    );
    let withdrawn = world.grant(Rights::ReadOnly, None)?;
    world.revoke(withdrawn.grant)?;
    report.equal(
        "a revoked token is refused",
        &attach(&mut tool, withdrawn.token.words())?,
        &"ENOENT".into(),
    );

    let (_, seen) = attach_by_kvmi(world, &mut tool)?;
    report.equal("a token by KVMI attaches too", &seen, &"0".into());
    world.admin()?.policy(TARGET, Some(KvmiPolicy::ReadOnly))?;
    let (device, seen) = attach_by_kvmi(world, &mut tool)?;
    ensure!(seen == "0", "not attached: {seen}");
    let gpa = world.gpa()?;
    report.equal(
        "by policy read-only",
        &errno(tool.mmap(&device, gpa, 0x1000, "rw")?),
        &"EACCES".into(),
    );
    world.admin()?.policy(TARGET, Some(KvmiPolicy::None))?;
    let refused = world.kvmi_token().err().map(|error| format!("{error:#}"));
    report.check("by policy not at all", refused.is_some(), refused.unwrap_or_default());
    world.admin()?.policy(TARGET, Some(KvmiPolicy::ReadWrite))?;
    report.check("and again", world.kvmi_token().is_ok(), "");
    Ok(())
}
