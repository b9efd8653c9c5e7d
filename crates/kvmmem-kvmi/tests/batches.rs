// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sequences of commands, offered or not, alone and in batches, against what libkvmi expects to
//! receive.

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::command;
use kvmmem_kvmi::dispatch::{Dispatcher, ReplyBuffer, TargetVm};
use kvmmem_kvmi::message::Header;
use kvmmem_kvmi::reply::PhysicalSlot;
use kvmmem_kvmi::token::Token;
use proptest::prelude::*;

/// A VM with one vCPU, all of whose memory is zero.
struct Vm;

impl TargetVm for Vm {
    fn name(&self) -> &str {
        "tiger"
    }
    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }
    fn start_time_ms(&self) -> i64 {
        0
    }
    fn vcpu_count(&self) -> u32 {
        1
    }
    fn max_gfn(&self) -> u64 {
        1
    }
    fn slot(&self, gfn: u64) -> Result<PhysicalSlot, KvmError> {
        Ok(PhysicalSlot { gfn: gfn.into(), pages: 1.into() })
    }
    fn read(&self, _: u64, buffer: &mut [u8]) -> Result<(), KvmError> {
        buffer.fill(0);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), KvmError> {
        Ok(())
    }
    fn mint_token(&self) -> Result<Token, KvmError> {
        Ok(Token::new([1; 4]))
    }
}

const OPNOTSUPP: i32 = -95;
const INVAL: i32 = -22;

/// One command, as a client may send it; replies are switched by [`Step`] alone.
#[derive(Clone, Debug)]
struct Command {
    id: u16,
    payload: Vec<u8>,
}

impl Command {
    /// What the client gets for it with the replies on; `None` for nothing at all.
    fn outcome(&self) -> Option<i32> {
        match (self.id, self.payload.len()) {
            (command::EVENT_REPLY, _) => None,
            // Those for a vCPU need its header; there is one vCPU.
            (6 | 7 | 9..=11 | 13..=16 | 19 | 23, size)
                if size < 8 || self.payload[..8] != [0; 8] =>
            {
                Some(INVAL)
            }
            // READ_PHYSICAL and WRITE_PHYSICAL as `commands` makes them.
            (17 | 18, size) if size < 16 => Some(INVAL),
            (2 | 5 | 17 | 18 | 22 | 29, _) => Some(0),
            _ => Some(OPNOTSUPP),
        }
    }

    fn returns_data(&self) -> bool {
        matches!(self.id, 2 | 5 | 17 | 22 | 29)
    }

    fn is_refused(&self) -> bool {
        !command::is_offered(self.id)
    }
}

fn commands() -> impl Strategy<Value = Command> {
    let offered =
        prop_oneof![Just(2u16), Just(5), Just(22), Just(29)].prop_map(|id| (id, Vec::new()));
    let reads = prop_oneof![
        Just((17, [0u64.to_le_bytes(), 8u64.to_le_bytes()].concat())),
        Just((17, Vec::new())),
        Just((18, [&0u64.to_le_bytes()[..], &2u64.to_le_bytes(), b"ab"].concat())),
        Just((18, Vec::new())),
    ];
    // Those whose payload decides the outcome are made above.
    let others = (0u16..70, any::<bool>(), 0usize..24)
        .prop_filter("made above", |(id, ..)| !command::is_offered(*id))
        .prop_map(|(id, is_first, size)| {
            let mut payload = vec![0; size];
            if let Some(vcpu) = payload.first_mut() {
                *vcpu = u8::from(!is_first);
            }
            (id, payload)
        });
    prop_oneof![offered, reads, others].prop_map(|(id, payload)| Command { id, payload })
}

/// What a client does next.
#[derive(Clone, Debug)]
enum Step {
    /// Sends a command and waits for its reply.
    Call(Command),
    /// Sends commands in a batch, as libkvmi does: replies off from this message on, commands,
    /// replies on from this message on; then waits for the reply to the last message.
    Batch(Vec<Command>),
    /// The same, but the first message is answered and the last one is not: each holds for what
    /// follows it.
    Late(Vec<Command>),
}

fn steps() -> impl Strategy<Value = Step> {
    // No client asks for data that it has switched off.
    let batch = || {
        proptest::collection::vec(
            commands().prop_filter("silent", |command| !command.returns_data()),
            0..6,
        )
    };
    prop_oneof![
        commands().prop_map(Step::Call),
        batch().prop_map(Step::Batch),
        batch().prop_map(Step::Late)
    ]
}

/// A client: what it has sent, and which replies it waits for, in order.
#[derive(Default)]
struct Client {
    sent: Vec<(Header, Vec<u8>)>,
    /// Id, sequence number and error of each.
    expected: Vec<(u16, u32, i32)>,
}

impl Client {
    fn send(&mut self, id: u16, payload: &[u8]) -> u32 {
        let seq = u32::try_from(self.sent.len()).unwrap();
        let size = u16::try_from(payload.len()).unwrap();
        self.sent.push((Header::new(id, size, seq), payload.to_vec()));
        seq
    }

    fn switch(&mut self, enable: bool, now: bool) -> u32 {
        self.send(27, &[enable.into(), now.into(), 0, 0, 0, 0, 0, 0])
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Call(command) => {
                let seq = self.send(command.id, &command.payload);
                self.expected.extend(command.outcome().map(|error| (command.id, seq, error)));
            }
            Step::Batch(commands) => {
                self.switch(false, true);
                let error = self.silently(commands);
                let seq = self.switch(true, true);
                self.expected.push((27, seq, error));
            }
            Step::Late(commands) => {
                let seq = self.switch(false, false);
                self.expected.push((27, seq, 0));
                self.silently(commands);
                self.switch(true, false);
            }
        }
    }

    /// Sends commands with the replies off; returns the error of the first that is refused.
    fn silently(&mut self, commands: &[Command]) -> i32 {
        for command in commands {
            self.send(command.id, &command.payload);
        }
        let refused = commands.iter().filter(|command| command.is_refused());
        refused.filter_map(Command::outcome).next().unwrap_or(0)
    }
}

proptest! {
    #[test]
    fn a_client_stays_in_step(steps in proptest::collection::vec(steps(), 0..20)) {
        let mut client = Client::default();
        steps.iter().for_each(|step| client.take(step));

        let (mut dispatcher, mut buffer) = (Dispatcher::default(), ReplyBuffer::default());
        let mut got = Vec::new();
        for (header, payload) in &client.sent {
            let reply = dispatcher.answer(&Vm, *header, payload, &mut buffer).unwrap();
            if let Some(reply) = reply {
                let header = Header::parse(reply).unwrap();
                let error = i32::from_le_bytes(reply[8..12].try_into().unwrap());
                prop_assert!(error == 0 || reply.len() == 16);
                got.push((header.id.get(), header.seq.get(), error));
            }
        }
        prop_assert_eq!(got, client.expected);
    }
}
