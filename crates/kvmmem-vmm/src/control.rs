// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Control of a running machine by the caller of [`crate::run`]: status events, stop requests, and
//! the source of tokens.

use std::sync::Arc;

use crate::introspect::source::TokenSource;
use crate::machine::stop::StopHandle;
use crate::status::VmStatus;

/// What is called for every event.
type Watch = dyn Fn(&VmStatus) + Send + Sync;

/// The caller's side of a running machine.
#[derive(Default)]
pub struct Control {
    stop: StopHandle,
    on_status: Option<Box<Watch>>,
    tokens: Option<Arc<dyn TokenSource>>,
    handle_signals: bool,
}

impl Control {
    /// A control that watches nothing; signals keep their disposition.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `watch` for every event of the machine, from the thread that called [`crate::run`].
    #[must_use]
    pub fn on_status(mut self, watch: impl Fn(&VmStatus) + Send + Sync + 'static) -> Self {
        self.on_status = Some(Box::new(watch));
        self
    }

    /// Stops the machine cleanly on SIGINT, SIGTERM and SIGHUP.
    #[must_use]
    pub fn handle_signals(mut self) -> Self {
        self.handle_signals = true;
        self
    }

    /// Redeems tokens from `tokens` instead of the configured broker.
    #[must_use]
    pub fn with_tokens(mut self, tokens: Arc<dyn TokenSource>) -> Self {
        self.tokens = Some(tokens);
        self
    }

    /// A handle that stops the machine from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    pub(crate) fn report(&self, status: &VmStatus) {
        if let Some(watch) = &self.on_status {
            watch(status);
        }
    }

    pub(crate) fn tokens(&self) -> Option<Arc<dyn TokenSource>> {
        self.tokens.clone()
    }

    pub(crate) fn wants_signals(&self) -> bool {
        self.handle_signals
    }
}
