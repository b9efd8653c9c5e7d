//! The mapping engine: pages of a target in place of the introspector's own.

mod engine;
mod source;

pub(crate) use engine::mapping_limit;
pub use engine::{MapError, MappingEngine};
pub use source::{TargetMemory, TokenSource};
