// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which broker, `kvmmemd`, to ask.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem::view::default_socket;
use kvmmem_client::admin::Admin;

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
