// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may look at whom: `grant create`, `grant list`, `grant revoke`.

mod table;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kvmmem_client::admin::{GrantInfo, GrantRequest, RevokeReport, Rights, Span};
use serde::Serialize;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::broker::Broker;
use crate::number::{count, integer, parse_uuid};
use crate::output::Output;
use crate::range::{GpaRange, RangeLine, in_order, parse_range};
use crate::time::parse_duration;

/// Exit code of a revocation that a VMM or a process has not confirmed.
const UNCONFIRMED: u8 = 3;

#[derive(Args)]
pub(crate) struct Grant {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Grant access to a target's memory: prints a token.
    Create(Create),
    /// List the grants and the views opened with them.
    List(List),
    /// Revoke a grant and close every view opened with it.
    Revoke(Revoke),
}

#[derive(Args)]
#[command(after_help = CREATE_HELP)]
struct Create {
    /// Name or UUID of the target
    target: String,
    /// Grant these guest-physical addresses, for example 1M..2M; END is not part of it; may be
    /// given again [default: all RAM]
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    ranges: Vec<GpaRange>,
    /// Allow writing too
    #[arg(long)]
    rw: bool,
    /// How long the token can be used, for example 500ms, 60s, 5m, 2h or 30d; views that it opened
    /// stay open
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_ttl)]
    ttl: Duration,
    /// How often the token can be used
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = integer(1..=u32::MAX))]
    uses: u32,
    /// UUID of the only introspector that may use the token [default: anyone who has it may]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    holder: Option<Uuid>,
    /// What the list of grants shows of it
    #[arg(long, value_name = "TEXT", value_parser = parse_label)]
    label: Option<String>,
    /// Print the token alone
    #[arg(long, short = 'q', conflicts_with = "json")]
    print_token: bool,
    #[command(flatten)]
    broker: Broker,
}

const CREATE_HELP: &str = "\
Prints the number of the grant and its token, which is not shown again: a process that has it can look at the target.
What is printed is a token file, as text and as JSON: kvmmem grant create NAME | kvmmem read --token-file - 0 64.
On the host, --target NAME of the verbs that need a token makes a grant for one use by itself.";

#[derive(Args)]
struct List {
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
#[command(after_help = REVOKE_HELP)]
struct Revoke {
    /// Number of the grant
    #[arg(value_parser = parse_number)]
    grant: u64,
    #[command(flatten)]
    broker: Broker,
}

const REVOKE_HELP: &str = "\
Exit codes:
  0  revoked; every view opened with the grant is closed
  1  failed, standard error says why
  2  the command line is wrong
  3  revoked, but the VMM of an introspector, or a process of this host, has not confirmed that its views are closed: it
     may be stopped or hang; run this again, or end it";

/// Reads how long a token can be used.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        time if time > GrantRequest::MAX_TTL => Err("it is at most 30d".into()),
        time => Ok(time),
    }
}

fn parse_label(text: &str) -> Result<String, String> {
    let refused = || {
        format!("a label has at most {} bytes and no control characters", GrantRequest::MAX_LABEL)
    };
    GrantRequest::is_label(text).then(|| text.to_owned()).ok_or_else(refused)
}

/// Reads a grant's number.
fn parse_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        "a grant is named by its number: kvmmem grant list shows those that there are".into()
    })
}

/// What was granted, as JSON.
#[derive(Serialize)]
struct GrantLine<'a> {
    grant: u64,
    token: &'a str,
    target: &'a str,
    rights: Rights,
    /// `null` for all RAM.
    spans: Option<Vec<RangeLine>>,
    ttl_ms: u64,
    uses: u32,
    holder: Option<Uuid>,
    label: Option<&'a str>,
}

/// What was revoked, as JSON.
#[derive(Serialize)]
struct RevocationLine {
    grant: u64,
    #[serde(flatten)]
    outcome: RevokeReport,
}

impl Grant {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        match &self.verb {
            Verb::Create(create) => create.run(output),
            Verb::List(list) => list.run(output),
            Verb::Revoke(revoke) => revoke.run(output),
        }
    }
}

impl Create {
    fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let ranges = in_order(&self.ranges)?;
        let span = |range: &GpaRange| Span { gpa: range.start, len: range.end - range.start };
        let request = GrantRequest {
            target: self.target.clone(),
            spans: (!ranges.is_empty()).then(|| ranges.iter().map(span).collect()),
            rights: if self.rw { Rights::ReadWrite } else { Rights::ReadOnly },
            ttl_ms: u64::try_from(self.ttl.as_millis())?,
            uses: self.uses,
            holder: self.holder,
            label: self.label.clone(),
        };
        let granted = self
            .broker
            .connect()?
            .grant(&request)
            .with_context(|| format!("cannot grant access to {:?}", self.target))?;
        let token = granted.token.to_hex();
        if output.is_json() {
            output.object(&GrantLine {
                grant: granted.grant,
                token: &token,
                target: &request.target,
                rights: request.rights,
                spans: request.spans.as_ref().map(|spans| spans.iter().map(range_line).collect()),
                ttl_ms: request.ttl_ms,
                uses: request.uses,
                holder: request.holder,
                label: request.label.as_deref(),
            })?;
        } else if self.print_token {
            output.styled(token.as_str())?;
        } else {
            output.line(format!("grant {}", granted.grant))?;
            output.styled(Zeroizing::new(format!("token {}", *token)).as_str())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let grants = self.broker.connect()?.grants().context("cannot list the grants")?;
        if output.is_json() {
            for grant in &grants {
                output.object(&line(grant)?)?;
            }
        } else if grants.is_empty() {
            output.line("there are no grants")?;
        } else {
            for line in table::lines(&grants) {
                output.line(line)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn range_line(span: &Span) -> RangeLine {
    RangeLine::new(span.gpa, span.len)
}

/// A grant, as JSON: as the broker describes it, but for the form of addresses.
fn line(grant: &GrantInfo) -> serde_json::Result<serde_json::Value> {
    let spans =
        grant.scope.spans.as_ref().map(|spans| spans.iter().map(range_line).collect::<Vec<_>>());
    let mut line = serde_json::to_value(grant)?;
    if let Some(place) = line.pointer_mut("/scope/spans") {
        *place = serde_json::to_value(spans)?;
    }
    Ok(line)
}

impl Revoke {
    fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let grant = self.grant;
        let outcome = self
            .broker
            .connect()?
            .revoke(grant)
            .with_context(|| format!("cannot revoke grant {grant}"))?;
        let RevokeReport { views, unconfirmed, micros } = outcome;
        if output.is_json() {
            output.object(&RevocationLine { grant, outcome })?;
        } else {
            let milliseconds = Duration::from_micros(micros).as_secs_f64() * 1000.0;
            output.line(if unconfirmed == 0 {
                format!(
                    "grant {grant} is revoked; {} ended, in {milliseconds:.3} ms",
                    count(views, "view")
                )
            } else {
                format!(
                    "grant {grant} is revoked, but not confirmed by {unconfirmed} of its users after {milliseconds:.3} ms: \
                     see kvmmem grant revoke --help"
                )
            })?;
        }
        Ok(if unconfirmed == 0 { ExitCode::SUCCESS } else { ExitCode::from(UNCONFIRMED) })
    }
}
