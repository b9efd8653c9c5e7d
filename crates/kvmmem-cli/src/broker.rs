//! Where the broker, `kvmmemd`, is found.

use std::path::PathBuf;

/// Environment variable with another path.
const SOCKET_VARIABLE: &str = "KVMMEM_BROKER";

/// Where kvmmemd listens unless it is told otherwise.
const DEFAULT_SOCKET: &str = "/run/kvmmem/kvmmemd.sock";

/// The broker's socket, where no option says which.
pub(crate) fn default_socket() -> PathBuf {
    std::env::var_os(SOCKET_VARIABLE).map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from)
}
