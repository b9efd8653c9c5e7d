// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a probe gets its tokens: by KVMI over vsock, as a tool does, or from the scenario by
//! standard input, which is much quicker on an emulated host where a round trip out of the guest
//! takes milliseconds.

use std::collections::VecDeque;
use std::io::stdin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvmmem::{Endpoint, Listener, Session, SessionError, Token};
use kvmmem_abi::errno::KvmError;
use kvmmem_probe::More;

use crate::say;

/// How many tokens are requested at once on standard input; half of those that may be outstanding.
const BATCH: usize = 32;

/// How long to wait for the host to call, and for a token.
const PATIENCE: Duration = Duration::from_secs(120);

/// Before a token is asked for again.
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) enum Tokens {
    Session(Session),
    Stdin(VecDeque<Token>),
}

impl Tokens {
    /// By KVMI on the vsock port, or by standard input without one.
    pub(crate) fn open(port: Option<u32>) -> Result<Self> {
        Ok(match port {
            Some(port) => {
                let listener = Listener::bind(&Endpoint::Vsock(port))?;
                Self::Session(listener.accept(PATIENCE)?)
            }
            None => Self::Stdin(VecDeque::new()),
        })
    }

    /// The next token; `left` is how many will be wanted, this one included.
    pub(crate) fn next(&mut self, left: usize) -> Result<Token> {
        match self {
            Self::Session(session) => token(session),
            Self::Stdin(tokens) => {
                if tokens.is_empty() {
                    let more = left.clamp(1, BATCH);
                    say(&More { more })?;
                    for _ in 0..more {
                        tokens.push_back(read_token()?);
                    }
                }
                tokens.pop_front().context("no token")
            }
        }
    }
}

/// A token by KVMI. A host that asks to come again is asked again, as libkvmi does: under a stock
/// QEMU it plugs a view in first.
pub(crate) fn token(session: &mut Session) -> Result<Token> {
    let end = Instant::now() + PATIENCE;
    loop {
        match session.map_token() {
            Err(SessionError::Refused { error: KvmError::Again, .. }) if Instant::now() < end => {
                std::thread::sleep(PAUSE);
            }
            answer => return Ok(answer?),
        }
    }
}

/// One line of four words in hex.
fn read_token() -> Result<Token> {
    let mut line = String::new();
    ensure!(stdin().read_line(&mut line).context("cannot read a token")? > 0, "the tokens ended");
    let words = line
        .split_whitespace()
        .map(|word| u64::from_str_radix(word, 16))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{line:?} is no token"))?;
    Ok(Token::new(words.try_into().ok().context("a token is four words")?))
}
