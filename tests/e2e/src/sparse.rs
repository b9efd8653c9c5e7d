// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A target without a guest: RAM of any size, hardly any of it allocated.

use anyhow::{Context, Result};
use kvmmem_client::vmm::{Region, VmIdentity, VmmLink};
use kvmmem_sys::ram::{GuestRam, RamRegion};
use rustix::fs::fstat;
use uuid::Uuid;

use crate::world::World;

/// Registered until it is dropped.
pub(crate) struct Sparse {
    pub(crate) name: &'static str,
    ram: GuestRam,
    _link: VmmLink,
}

impl Sparse {
    pub(crate) fn register(world: &World, name: &'static str, bytes: u64) -> Result<Self> {
        let ram = GuestRam::new(bytes)?;
        let region =
            |ram: RamRegion| Region { gpa: ram.gpa, len: ram.len, offset: ram.gpa, file: 0 };
        let registration = VmIdentity::target(name, Uuid::from_u128(u128::from(bytes)))
            .registered(ram.regions().into_iter().map(region).collect());
        let fd = ram.fd().try_clone_to_owned().context("cannot copy the RAM's descriptor")?;
        let link = VmmLink::connect(&world.socket(), registration, Some(fd))
            .with_context(|| format!("cannot register {name}"))?;
        Ok(Self { name, ram, _link: link })
    }

    /// Bytes of its RAM that the host holds.
    pub(crate) fn allocated(&self) -> Result<u64> {
        let blocks = fstat(self.ram.fd()).context("cannot examine the RAM")?.st_blocks;
        Ok(u64::try_from(blocks)? * 512)
    }
}
