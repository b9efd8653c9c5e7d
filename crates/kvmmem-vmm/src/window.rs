// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows: guest-physical memory outside of RAM through which a guest sees its targets.
//!
//! A view is what a token opens. Each of its ranges is one memory slot ([`view`]) at a place of its
//! own ([`area`]), and a descriptor page tells the guest where ([`descriptors`]). [`windows`] and
//! [`seek`] do what the guest asks for, [`events`] what it is not asked about.

mod area;
mod descriptors;
mod error;
mod events;
mod seek;
mod table;
mod view;
mod windows;
mod worker;

pub use descriptors::DescriptorsError;
pub use error::SetUpError;
pub use events::Views;
pub use view::TakeError;

pub(crate) use descriptors::MAX_VIEWS;
pub(crate) use error::WindowError;
pub(crate) use seek::{Progress, Seek};
pub(crate) use windows::{Host, MAX_SLOTS_PER_VIEW, Windows};
