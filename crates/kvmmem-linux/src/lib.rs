// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Linux guest read from its memory alone, without symbol files.
#![deny(unsafe_code)]

pub mod vmcoreinfo;
