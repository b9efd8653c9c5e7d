// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker's clients ask of a VMM. QEMU is asked over its [`Monitor`], on the client's
//! thread; a VMM that has registered its VM itself by the broker over the connection that
//! registered it. Clients wait for a limited time.
//!
//! [`Monitor`]: crate::monitor::Monitor

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use kvmmem_proto::message::{VcpuAnswer, VcpuQuestion, VcpuRegisters};

use crate::qmp::QmpError;

/// How long a client waits for its answer: less than it waits for the broker's. Tests run on
/// machines of any speed.
pub const LIMIT: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 4 });

/// The most questions that wait, besides those that end a pause.
pub const MAX_WAITING: usize = 64;

/// How much of a VMM's message is repeated, characters.
const MAX_MESSAGE: usize = 200;

/// Where an answer goes.
pub type Reply = Sender<Result<VcpuAnswer, AskError>>;

/// Takes questions to a VMM.
pub trait Ask: Debug + Send + Sync {
    /// Passes a question on. `reply` gets the answer later, or is dropped where there is none.
    /// Where it is `None` no client waits, and this must not wait for the VMM.
    fn put(&self, question: VcpuQuestion, reply: Option<Reply>) -> Result<(), AskError>;
}

/// What a VMM can be asked.
#[derive(Clone, Debug)]
pub struct Questions(Arc<dyn Ask>);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The connection is lost, or the target is gone.
    #[error("the connection to its VMM is lost; try again, and see the broker's log")]
    NoConnection,
    /// It takes too long.
    #[error("its VMM has not answered for {LIMIT:?}")]
    Silent,
    /// Too many questions wait.
    #[error("{MAX_WAITING} questions wait for its VMM already")]
    Busy,
    /// QEMU's answer is no good.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// What resumes the VM if the broker is killed cannot be started.
    #[error(
        "cannot start the shell that resumes the VM if the broker is killed; the VM was not paused"
    )]
    Watcher(#[source] io::Error),
    /// The VMM does not read what the broker sends.
    #[error("its VMM does not read what the broker sends; try again")]
    Deaf,
    /// The VMM did not do it.
    #[error("its VMM reports: {0}")]
    Failed(String),
    /// The VMM answered another question.
    #[error("its VMM's answer makes no sense")]
    Nonsense,
    /// The pause has ended before.
    #[error(
        "the VM runs again: another client of its VMM has resumed it, the connection to the VMM was lost, or the pause was \
         not asked for again in time"
    )]
    Resumed,
}

impl Questions {
    /// Questions to a VMM.
    pub fn new(vmm: Arc<dyn Ask>) -> Self {
        Self(vmm)
    }

    /// The registers of at most `count` vCPUs from the `first` one on, and whether there are more.
    pub fn registers(
        &self,
        first: u32,
        count: u32,
    ) -> Result<(Vec<VcpuRegisters>, bool), AskError> {
        match self.ask(VcpuQuestion::Registers { first, count })? {
            VcpuAnswer::Registers { mut vcpus, more } => {
                vcpus.truncate(usize::try_from(count).unwrap_or(usize::MAX));
                Ok((vcpus, more))
            }
            _ => Err(AskError::Nonsense),
        }
    }

    /// Stops the VM until the pause is dropped. Also returns whether it ran.
    pub fn pause(&self) -> Result<(Pause, bool), AskError> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let holder = LAST.fetch_add(1, Ordering::Relaxed);
        // Made first: where the answer comes too late, its drop undoes what is done by then.
        let pause = Pause { questions: self.clone(), holder };
        let was_running = pause.hold(true)?;
        Ok((pause, was_running))
    }

    fn ask(&self, question: VcpuQuestion) -> Result<VcpuAnswer, AskError> {
        let (reply, answer) = mpsc::channel();
        self.0.put(question, Some(reply))?;
        match answer.recv_timeout(LIMIT) {
            Ok(Ok(VcpuAnswer::NotPaused)) => Err(AskError::Resumed),
            Ok(Ok(VcpuAnswer::Failed { message })) => {
                let message = message.chars().take(MAX_MESSAGE).flat_map(char::escape_debug);
                Err(AskError::Failed(message.collect()))
            }
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(AskError::Silent),
            Err(RecvTimeoutError::Disconnected) => Err(AskError::NoConnection),
        }
    }
}

/// One client's pause of a VM. Dropping it lets the VM run again, unless another one holds it
/// stopped.
#[derive(Debug)]
pub struct Pause {
    questions: Questions,
    holder: u64,
}

impl Pause {
    /// Whether the VM ran before the pause.
    ///
    /// # Errors
    /// [`AskError::Resumed`] where it has run since.
    pub fn check(&self) -> Result<bool, AskError> {
        self.hold(false)
    }

    fn hold(&self, is_new: bool) -> Result<bool, AskError> {
        match self.questions.ask(VcpuQuestion::Pause { holder: self.holder, is_new })? {
            VcpuAnswer::Paused { was_running } => Ok(was_running),
            _ => Err(AskError::Nonsense),
        }
    }

    /// Ends the pause, and waits until it has ended.
    ///
    /// # Errors
    /// [`AskError`]; [`AskError::Resumed`] where it had ended before.
    pub fn end(self) -> Result<(), AskError> {
        match self.questions.ask(VcpuQuestion::Resume { holder: self.holder })? {
            VcpuAnswer::Resumed => Ok(()),
            _ => Err(AskError::Nonsense),
        }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        // Where no thread is there to answer, the VM runs already. After an end this is the second
        // one, and does nothing.
        let _ = self.questions.0.put(VcpuQuestion::Resume { holder: self.holder }, None);
    }
}
