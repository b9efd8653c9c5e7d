// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare guests whose hypercalls wait for a broker that does not answer.

use std::sync::Arc;

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{ATTACH, MEM_MAP};
use kvmmem_client::vmm::Rights;
use kvmmem_vmm::VmExit;

use crate::fixture::{refused, run_with_tokens, wait_until, window_methods};
use crate::guest::Guest;
use crate::tokens::OneToken;
use crate::views::{FIRST, REQUEST, RESULT, THERE, guest, secret};

/// A page for the guest's interrupt table.
const TABLE: u64 = 0x53_0000;
/// A page of the guest's own.
const OWN: u64 = 0x60_0000;

/// Has the broker answer in the end, however that comes: the guest would wait for ever.
struct AnswerGuard<'a>(&'a OneToken);

impl Drop for AnswerGuard<'_> {
    fn drop(&mut self) {
        self.0.speak();
    }
}

/// Runs a guest with a timer, whose `call` asks a broker that is silent until interrupts were
/// served; returns what the guest reports after them.
fn run_past_silence(program: Guest, tokens: &Arc<OneToken>, reported: usize) -> Vec<u64> {
    let directory = tempfile::tempdir().unwrap();
    let serial = directory.path().join("serial");
    tokens.be_silent();
    let sent = || std::fs::metadata(&serial).map_or(0, |file| file.len());
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            let _speaking = AnswerGuard(tokens);
            wait_until(|| tokens.asked() > 0);
            let before = sent();
            wait_until(|| sent() >= before + 3);
        });
        run_with_tokens(&program, tokens, |config| {
            config.serial = kvmmem_vmm::SerialConfig::File(serial.clone());
        })
        .unwrap()
    });
    assert_eq!(outcome.exit, VmExit::PowerOff);
    let output = std::fs::read(&serial).unwrap();
    let values = output
        .rchunks_exact(8)
        .take(reported)
        .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    let mut values: Vec<u64> = values.collect();
    values.reverse();
    values
}

#[test]
fn a_vcpu_whose_call_waits_for_the_broker_serves_interrupts() {
    for method in window_methods() {
        let (_, tokens) = secret(Rights::ReadWrite);
        let attach = guest(method)
            .start_timer(TABLE)
            .call_and(ATTACH, [REQUEST, RESULT, 0], Guest::mask_interrupts)
            .report_memory(FIRST + THERE)
            .power_off();
        assert_eq!(run_past_silence(attach, &tokens, 2), [0, 0x5ec2e7]);
        assert_eq!(tokens.asked(), 1);

        let (_, tokens) = secret(Rights::ReadWrite);
        let map = guest(method)
            .start_timer(TABLE)
            .call_and(MEM_MAP, [REQUEST, THERE, OWN], Guest::mask_interrupts)
            .report_memory(OWN)
            // The token was used once, for a page that is mapped.
            .call(MEM_MAP, [REQUEST, THERE, OWN])
            .power_off();
        assert_eq!(run_past_silence(map, &tokens, 3), [0, 0x5ec2e7, refused(KvmError::Busy)]);
        assert_eq!(tokens.asked(), 1);
    }
}
