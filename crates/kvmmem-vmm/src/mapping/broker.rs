// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker as the source of targets.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvmmem_abi::errno::KvmError;
use kvmmem_broker::link::{LinkError, RedeemError, Redeemed, Region, Registration, Rights, Token, VmmLink};
use kvmmem_sys::ram::GuestRam;
use uuid::Uuid;

use super::source::{TargetMemory, TokenSource};
use crate::config::VmConfig;

/// Registers the machine with the broker at `socket`; it stays registered until the link is dropped.
///
/// An introspectable machine hands out `fd`, the file of `ram`.
pub(crate) fn register(
    config: &VmConfig,
    socket: &Path,
    ram: &GuestRam,
    fd: Option<OwnedFd>,
) -> Result<VmmLink, LinkError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let registration = Registration {
        name: config.name.clone(),
        uuid: Uuid::from_bytes(config.uuid),
        vcpus: config.vcpus.into(),
        start_time_ms: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        cid: config.cid,
        introspectable: config.introspectable,
        introspector: config.introspector,
        regions: if config.introspectable { regions(ram) } else { Vec::new() },
    };
    VmmLink::connect(socket, registration, fd)
}

fn regions(ram: &GuestRam) -> Vec<Region> {
    ram.regions()
        .into_iter()
        .map(|region| Region { gpa: region.gpa, len: region.len, offset: region.gpa })
        .collect()
}

impl TokenSource for VmmLink {
    fn redeem(&self, token: &Token) -> Result<Arc<dyn TargetMemory>, KvmError> {
        match VmmLink::redeem(self, token) {
            // A page is mapped read-write, or not at all.
            Ok(redeemed) if redeemed.scope.rights != Rights::ReadWrite => Err(KvmError::Perm),
            Ok(redeemed) => Ok(Arc::new(Granted(redeemed))),
            Err(RedeemError::Unknown) => Err(KvmError::NoEnt),
            Err(RedeemError::Unavailable) => Err(KvmError::Again),
            Err(RedeemError::Denied) => Err(KvmError::Perm),
        }
    }
}

/// A target, as far as its grant reaches.
struct Granted(Redeemed);

impl TargetMemory for Granted {
    fn ram(&self) -> BorrowedFd<'_> {
        self.0.target.ram()
    }

    fn resolve(&self, gpa: u64) -> Option<u64> {
        self.0.target.resolve(gpa).filter(|_| self.0.scope.contains(gpa))
    }
}
