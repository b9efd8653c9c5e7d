// SPDX-License-Identifier: GPL-2.0-only
//! The ABI's structures as bytes, for copies to and from user memory.

use kernel::transmute::{AsBytes, FromBytes};

use crate::abi::native;

// SAFETY: `repr(C)` integers whose sizes add up to the structure's (asserted where it is defined),
// so there is no padding and every byte is initialised.
unsafe impl AsBytes for native::Info {}
// SAFETY: `repr(C)` integers whose sizes add up to the structure's (asserted where it is defined),
// so there is no padding and every byte is initialised.
unsafe impl AsBytes for native::Ranges {}
// SAFETY: two `u64`, so there is no padding and every byte is initialised.
unsafe impl AsBytes for native::Range {}
// SAFETY: `u64` only, so there is no padding and every byte is initialised.
unsafe impl AsBytes for native::Stats {}
// SAFETY: integers only, for which every bit pattern is valid, and no interior mutability.
unsafe impl FromBytes for native::Ranges {}
