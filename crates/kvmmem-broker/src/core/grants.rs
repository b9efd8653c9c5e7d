// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grants: what tokens allow, and the views that were opened with them.

mod end;
mod error;
mod expiry;
mod grant;
mod index;
mod leaving;
mod list;
mod table;
#[cfg(test)]
mod tests;
mod use_token;
mod views;

pub(crate) use end::RevokedGrant;
pub(crate) use error::UseError;
pub(crate) use grant::{Access, Holder, Terms, User, View};
pub(crate) use list::Names;
pub(crate) use table::Grants;
