// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rate limit for log lines that a guest can cause: per call site a burst of five, then one a
//! second.

/// `tracing::warn!` that a guest may trigger: limited per call site, with the number of lines left
/// out.
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        use ::kvmmem_limit::{Rate, RateLimit};
        static LIMIT: RateLimit = RateLimit::at(Rate { burst: 5, per_second: 1 });
        if let Some(suppressed) = LIMIT.allow(::std::time::Instant::now()) {
            ::tracing::warn!(suppressed, $($arg)+);
        }
    }};
}
pub(crate) use warn_limited;
