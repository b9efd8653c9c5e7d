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
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use kvmmem_proto::message::VcpuRegisters;

use crate::qmp::QmpError;

/// How long a client waits for its answer: less than it waits for the broker's. Tests run on
/// machines of any speed.
pub const LIMIT: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 4 });

/// The most questions that wait, besides those that end a pause.
pub const MAX_WAITING: usize = 64;

/// A page of registers, and whether there are more.
pub type Page = (Vec<VcpuRegisters>, bool);

/// Takes questions to a VMM.
pub trait Ask: Debug + Send + Sync {
    /// Passes a question on. Its reply is sent later, or dropped where there can be none.
    fn put(&self, question: Question) -> Result<(), AskError>;
}

/// What a VMM can be asked.
#[derive(Clone, Debug)]
pub struct Questions(Arc<dyn Ask>);

/// A question, and where its answer goes.
#[derive(Debug)]
pub enum Question {
    /// The registers of `count` vCPUs, from the `first` one on.
    Registers {
        /// Number of the first vCPU.
        first: usize,
        /// The most vCPUs.
        count: usize,
        /// Gets the answer.
        reply: Sender<Result<Page, AskError>>,
    },
    /// Stop the VM for `holder`, who holds it stopped already unless `is_new`.
    Pause {
        /// Number of the pause.
        holder: u64,
        /// Whether the pause begins.
        is_new: bool,
        /// Gets whether the VM ran.
        reply: Sender<Result<bool, AskError>>,
    },
    /// `holder` needs it stopped no more.
    Resume {
        /// Number of the pause.
        holder: u64,
        /// Gets the answer; `None` where no client waits, and nothing must wait for the VMM.
        reply: Option<Sender<Result<(), AskError>>>,
    },
}

impl Question {
    /// Answers with an error. A client that has given up waiting does not get it.
    pub fn fail(self, error: AskError) {
        match self {
            Self::Registers { reply, .. } => drop(reply.send(Err(error))),
            Self::Pause { reply, .. } => drop(reply.send(Err(error))),
            Self::Resume { reply, .. } => drop(reply.map(|reply| reply.send(Err(error)))),
        }
    }
}

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

    /// The registers of at most `count` vCPUs from the `first` one on.
    pub fn registers(&self, first: usize, count: usize) -> Result<Page, AskError> {
        self.ask(|reply| Question::Registers { first, count, reply })
    }

    /// Stops the VM until the pause is dropped. Also returns whether it ran.
    pub fn pause(&self) -> Result<(Pause, bool), AskError> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let holder = LAST.fetch_add(1, Ordering::Relaxed);
        // Made first: where the answer comes too late, its drop undoes what is done by then.
        let pause = Pause { questions: self.clone(), holder };
        let was_running = self.ask(|reply| Question::Pause { holder, is_new: true, reply })?;
        Ok((pause, was_running))
    }

    fn ask<T>(
        &self,
        question: impl FnOnce(Sender<Result<T, AskError>>) -> Question,
    ) -> Result<T, AskError> {
        let (reply, answer) = mpsc::channel();
        self.0.put(question(reply))?;
        wait(&answer)
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
        let holder = self.holder;
        self.questions.ask(|reply| Question::Pause { holder, is_new: false, reply })
    }

    /// Ends the pause, and waits until it has ended.
    ///
    /// # Errors
    /// [`AskError`]; [`AskError::Resumed`] where it had ended before.
    pub fn end(self) -> Result<(), AskError> {
        let holder = self.holder;
        self.questions.ask(|reply| Question::Resume { holder, reply: Some(reply) })
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        // Where no thread is there to answer, the VM runs already. After an end this is the second
        // one, and does nothing.
        let _ = self.questions.0.put(Question::Resume { holder: self.holder, reply: None });
    }
}

fn wait<T>(answer: &Receiver<Result<T, AskError>>) -> Result<T, AskError> {
    answer.recv_timeout(LIMIT).unwrap_or_else(|error| {
        Err(match error {
            RecvTimeoutError::Timeout => AskError::Silent,
            RecvTimeoutError::Disconnected => AskError::NoConnection,
        })
    })
}
