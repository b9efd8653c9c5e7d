// SPDX-License-Identifier: Apache-2.0 OR MIT
//! v1: replaces pages of the introspector with pages of targets.

mod engine;
mod error;

pub(crate) use engine::MappingEngine;
pub use engine::mapping_limit;
pub use error::MapError;
