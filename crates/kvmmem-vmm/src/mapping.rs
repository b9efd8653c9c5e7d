// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mapping engine of v1: replaces pages of the introspector with pages of targets.

mod broker;
mod engine;
mod source;

pub use kvmmem_client::vmm::Token;

pub(crate) use broker::{regions, register};
pub use engine::{MapError, MappingEngine, mapping_limit};
pub(crate) use engine::{identity, is_own};
pub use source::{Attached, Redeemed, TargetMemory, TokenSource};

pub use crate::window::Views;
