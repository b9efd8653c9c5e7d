// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which broker, `kvmmemd`, to ask.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_client::admin::Admin;

/// Environment variable with the path of the broker's socket.
const SOCKET_VARIABLE: &str = "KVMMEM_BROKER";

/// Where kvmmemd listens by default.
const DEFAULT_SOCKET: &str = "/run/kvmmem/kvmmemd.sock";

/// What to look at where the broker cannot be reached.
pub(crate) const NO_BROKER: &str = "no broker: is kvmmemd running, and may this user open its socket (root, or the socket's group)?";

#[derive(Args, Default)]
pub(crate) struct Broker {
    /// Socket of the broker [default: KVMMEM_BROKER, or else /run/kvmmem/kvmmemd.sock]
    #[arg(long = "broker", value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Broker {
    /// Connects to the broker.
    pub(crate) fn connect(&self) -> Result<Admin> {
        Admin::connect(&self.socket.clone().unwrap_or_else(default_socket)).context(NO_BROKER)
    }
}

/// The broker's socket, without an option.
pub(crate) fn default_socket() -> PathBuf {
    std::env::var_os(SOCKET_VARIABLE).map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from)
}
