// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tool's side of KVMI: a verb listens, waits for the host to connect, and reads memory or gets
//! a token.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::{Endpoint, Listener, ListenerError, Session};

use crate::escape::escape;
use crate::failure::usage;
use crate::time::parse_seconds;

/// Environment variable with the vsock port to listen on.
const PORT_VARIABLE: &str = "KVMMEM_KVMI_PORT";

#[derive(Args, Default)]
pub(crate) struct Connect {
    /// Where to listen for the host: vsock:PORT or unix:PATH [default: the vsock port
    /// KVMMEM_KVMI_PORT]
    #[arg(long, value_name = "ENDPOINT")]
    listen: Option<Endpoint>,

    /// How long to wait for the host, at most 1d; a number without a unit is in seconds
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_timeout)]
    timeout: Duration,
}

impl Connect {
    /// Whether the command line says where to listen.
    pub(crate) fn is_given(&self) -> bool {
        self.listen.is_some()
    }

    /// Whether there is a place to listen.
    pub(crate) fn is_possible(&self) -> bool {
        self.is_given() || std::env::var_os(PORT_VARIABLE).is_some()
    }

    /// Waits for a target. A connection that fails is logged, and the wait continues.
    pub(crate) fn accept(&self) -> Result<Session> {
        let endpoint = match &self.listen {
            Some(endpoint) => endpoint.clone(),
            None => from_environment(std::env::var(PORT_VARIABLE).ok())?,
        };
        let listener = Listener::bind(&endpoint)?;
        tracing::info!(%endpoint, "waiting for the host");
        let start = Instant::now();
        let limit = self.timeout;
        loop {
            match listener.accept(limit.saturating_sub(start.elapsed())) {
                Ok(session) => {
                    tracing::info!(target = %escape(session.name()), "connected");
                    return Ok(session);
                }
                Err(ListenerError::Session { source, .. }) => {
                    tracing::warn!("a connection was no good: {:#}", anyhow::Error::new(source));
                    if start.elapsed() >= limit {
                        return Err(ListenerError::Timeout { endpoint, limit }.into());
                    }
                }
                Err(ListenerError::Timeout { endpoint, .. }) => {
                    return Err(ListenerError::Timeout { endpoint, limit }.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    let day = Duration::from_secs(24 * 60 * 60);
    parse_seconds(text)
        .and_then(|time| if time > day { Err("it is at most 1d".into()) } else { Ok(time) })
}

fn from_environment(port: Option<String>) -> Result<Endpoint> {
    let port = port.ok_or_else(|| {
        usage(format!(
            "nowhere to listen: give --listen vsock:PORT or unix:PATH, or set {PORT_VARIABLE}"
        ))
    })?;
    format!("vsock:{port}").parse().with_context(|| format!("{PORT_VARIABLE} is not a port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_comes_from_the_environment() {
        assert_eq!(from_environment(Some("1234".into())).unwrap(), Endpoint::Vsock(1234));
        for bad in ["", "x", "1:2", "-1"] {
            let error = from_environment(Some(bad.into())).unwrap_err();
            assert!(error.to_string().contains(PORT_VARIABLE), "{error}");
        }
        assert!(from_environment(None).unwrap_err().to_string().contains("--listen"));
    }
}
