// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's types, from the BTF that it keeps of itself (`include/uapi/linux/btf.h`,
//! Documentation/bpf/btf.rst).
//!
//! A parser of our own: of the crates that read BTF none knows both the wide fields of 7.3 (7 bits
//! of kind, 24 of count) and modules' split BTF under a licence that this project can use, and what
//! is needed is small: where a member of a structure is, how large a type is, what an enumerator's
//! value is. The blob stays as it is, with an index of where each type begins and one by hash of
//! the name; nothing else is decoded before it is asked for.
//!
//! All of it is the guest's: each look-up ends after a limited number of steps, also where types
//! refer to each other.

mod layout;
mod member;
mod types;

pub use layout::BtfError;
pub use member::{Bits, Member, MemberError};
pub use types::{TypeId, Types};
