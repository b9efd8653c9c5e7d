// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one crate of kvmmem on the host's and the tool's side that may use `unsafe`: each module wraps one thing that
//! the kernel offers and no well-kept crate wraps safely.

pub mod device;
pub mod page;
pub mod pio;
pub mod ram;
pub mod xen;
