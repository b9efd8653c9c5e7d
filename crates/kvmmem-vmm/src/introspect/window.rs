// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows: guest-physical memory outside of RAM through which a guest sees its targets.
//!
//! Each range of a view is one memory slot ([`view`]) in the view's area ([`area`]), and a
//! descriptor page tells the guest where ([`descriptors`]). [`windows`] and [`seek`] serve the
//! guest's requests; [`changes`] are those about which the guest is not asked.

mod area;
mod changes;
mod descriptors;
mod error;
mod seek;
mod table;
mod view;
mod windows;
mod worker;

pub use descriptors::DescriptorsError;
pub use error::SetUpError;
pub use view::TakeError;

pub(crate) use descriptors::MAX_VIEWS;
pub(crate) use error::WindowError;
pub(crate) use seek::{Progress, Seek};
pub(crate) use view::State;
pub(crate) use windows::{Host, MAX_SLOTS_PER_VIEW, Windows};
