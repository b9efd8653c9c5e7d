// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values of a row.

use anyhow::{Context as _, Result};
use serde_json::Value;

pub(in crate::linux) fn number(row: &Value, key: &str) -> Result<u64> {
    row[key].as_u64().with_context(|| format!("no number {key} in {row}"))
}

pub(in crate::linux) fn text<'a>(row: &'a Value, key: &str) -> Result<&'a str> {
    row[key].as_str().with_context(|| format!("no text {key} in {row}"))
}
