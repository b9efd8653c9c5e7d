// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How `kvmmemd` is told what to do: its command line, and a configuration file beneath it.

use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use kvmmem_proto::client::DEFAULT_SOCKET;
use kvmmem_proto::guest::GUEST_PORT;
use kvmmem_proto::message::KvmiPolicy;

/// The host's service for kvmmem: knows the VMs, speaks KVMI with introspection tools, gives out
/// mapping tokens.
///
/// Started with a listening socket by a service manager (LISTEN_FDS), it serves that one and
/// ignores --socket and --group.
///
/// Exit status: 0 after SIGTERM or SIGINT; 1 if it cannot serve; 2 for a wrong command line; 3 if
/// another instance has the socket.
#[derive(Debug, Default, Parser, Deserialize)]
#[command(name = "kvmmemd", version)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Read what the command line leaves open from this TOML file; its keys are named like the
    /// options.
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    config: Option<PathBuf>,

    /// Where VMMs and the command line connect [default: /run/kvmmem/kvmmemd.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Name or number of a group whose members may connect too (the socket's mode is then 0660,
    /// else 0600).
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,

    /// Write the log to standard error as JSON, one object a line.
    #[arg(long)]
    json: bool,

    /// What to log, for example `debug` or `warn,audit=info` [default: RUST_LOG, else `info`].
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,

    /// Append the audit log to this file as JSON, one object a line, besides the other log.
    #[arg(long, value_name = "PATH")]
    audit: Option<PathBuf>,

    /// Remember in this folder which VMs were added, and add those again that still run when the
    /// broker starts anew.
    #[arg(long, value_name = "PATH")]
    state: Option<PathBuf>,

    /// What tokens allow that KVMI makes, for targets that have no policy of their own [default:
    /// rw].
    #[arg(long, value_name = "RIGHTS", value_enum)]
    kvmi_tokens: Option<KvmiTokens>,

    /// The vsock port at which introspectors under a stock QEMU ask for views, from the first one
    /// that is added on [default: 27510].
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u32).range(1..0xffff_ffff))]
    #[serde(deserialize_with = "port")]
    guest_port: Option<u32>,
}

/// As [`KvmiPolicy`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum KvmiTokens {
    /// Reading and writing all RAM
    #[default]
    Rw,
    /// Reading all RAM
    Ro,
    /// Nothing: no token is made
    None,
}

impl From<KvmiTokens> for KvmiPolicy {
    fn from(tokens: KvmiTokens) -> Self {
        match tokens {
            KvmiTokens::Rw => Self::ReadWrite,
            KvmiTokens::Ro => Self::ReadOnly,
            KvmiTokens::None => Self::None,
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Where to listen, unless a socket was passed.
    pub(crate) socket: PathBuf,
    /// Group whose members may connect: name or number.
    pub(crate) group: Option<String>,
    /// Whether the log is JSON.
    pub(crate) json: bool,
    /// Filter of the log, as `RUST_LOG` has it.
    pub(crate) log: String,
    /// File of the audit log.
    pub(crate) audit: Option<PathBuf>,
    /// Folder of what is remembered.
    pub(crate) state: Option<PathBuf>,
    /// What tokens allow that KVMI makes.
    pub(crate) kvmi_tokens: KvmiTokens,
    /// The vsock port of the guest endpoint.
    pub(crate) guest_port: u32,
}

/// Why the configuration file is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the configuration {path} is wrong")]
    Parse {
        path: PathBuf,
        #[source]
        source: toml::de::Error,
    },
}

impl Options {
    /// The command line, and beneath it the configuration file, if the command line names one.
    /// `rust_log` is the environment's `RUST_LOG`, which comes between the two.
    pub(crate) fn settings(self, rust_log: Option<String>) -> Result<Settings, ConfigError> {
        let config = self.config.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(Settings {
            socket: self.socket.or(config.socket).unwrap_or_else(|| DEFAULT_SOCKET.into()),
            group: self.group.or(config.group),
            json: self.json || config.json,
            log: self.log.or(rust_log).or(config.log).unwrap_or_else(|| "info".to_owned()),
            audit: self.audit.or(config.audit),
            state: self.state.or(config.state),
            kvmi_tokens: self.kvmi_tokens.or(config.kvmi_tokens).unwrap_or_default(),
            guest_port: self.guest_port.or(config.guest_port).unwrap_or(GUEST_PORT),
        })
    }
}

/// A vsock port as the command line takes it.
fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match u32::deserialize(deserializer)? {
        0 | u32::MAX => Err(D::Error::custom("guest-port is from 1 to 4294967294")),
        port => Ok(Some(port)),
    }
}

fn read(path: &Path) -> Result<Options, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(config: &str, words: &[&str], rust_log: Option<&str>) -> Result<Settings, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config).unwrap();
        let path = file.path().to_str().unwrap();
        let words = ["kvmmemd", "--config", path].into_iter().chain(words.iter().copied());
        let options = Options::try_parse_from(words).unwrap();
        options
            .settings(rust_log.map(str::to_owned))
            .map_err(|error| format!("{:#}", anyhow::Error::new(error)))
    }

    #[test]
    fn the_command_line_wins() {
        let config = "socket = \"/a\"\ngroup = \"g\"\njson = true\nlog = \"warn\"\naudit = \"/b\"\nstate = \"/s\"\nkvmi-tokens = \"ro\"\nguest-port = 5\n";
        let from_file = settings(config, &[], None).unwrap();
        let audit = Some("/b".into());
        let expected = Settings {
            socket: "/a".into(),
            group: Some("g".into()),
            json: true,
            log: "warn".into(),
            audit,
            state: Some("/s".into()),
            kvmi_tokens: KvmiTokens::Ro,
            guest_port: 5,
        };
        assert_eq!(from_file, expected);
        let words = [
            "--socket",
            "/c",
            "--group",
            "h",
            "--log",
            "debug",
            "--audit",
            "/d",
            "--guest-port",
            "6",
            "--state",
            "/t",
            "--kvmi-tokens",
            "none",
        ];
        let from_line = settings(config, &words, Some("error")).unwrap();
        let audit = Some("/d".into());
        let expected = Settings {
            socket: "/c".into(),
            group: Some("h".into()),
            json: true,
            log: "debug".into(),
            audit,
            state: Some("/t".into()),
            kvmi_tokens: KvmiTokens::None,
            guest_port: 6,
        };
        assert_eq!(from_line, expected);
        assert_eq!(settings(config, &[], Some("error")).unwrap().log, "error");
    }

    #[test]
    fn an_empty_file_leaves_the_defaults() {
        let settings = settings("# nothing\n", &[], None).unwrap();
        assert_eq!(settings.socket, Path::new(DEFAULT_SOCKET));
        assert_eq!(
            (settings.group, settings.json, settings.audit, settings.state),
            (None, false, None, None)
        );
        assert_eq!((settings.log.as_str(), settings.kvmi_tokens), ("info", KvmiTokens::Rw));
        assert_eq!(settings.guest_port, 27510);
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_named() {
        for (config, named) in [
            ("sockett = \"/a\"", "sockett"),
            ("json = 3", "json"),
            ("kvmi-tokens = \"all\"", "all"),
            ("guest-port = 0", "from 1 to"),
            ("guest-port = 4294967295", "from 1 to"),
            ("config = \"/a\"", "config"),
            ("[socket]", "socket"),
        ] {
            let error = settings(config, &[], None).unwrap_err();
            assert!(error.contains(named) && error.contains("line 1"), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let options = Options::try_parse_from(["kvmmemd", "--config", "/nowhere/at/all"]).unwrap();
        let error = options.settings(None).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
