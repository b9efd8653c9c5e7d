// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The mapping engine: pages of a target in place of the introspector's own.

mod broker;
mod engine;
mod source;

pub(crate) use broker::register;
pub(crate) use engine::mapping_limit;
pub use engine::{MapError, MappingEngine};
pub use kvmmem_broker::link::Token;
pub use source::{TargetMemory, TokenSource};
