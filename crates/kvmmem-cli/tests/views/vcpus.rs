// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vCPUs of a target whose VMM answers for them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvmmem_client::vmm::{Region, VcpuAnswer, VcpuQuestion, VcpuRegisters, Vcpus};
use serde_json::{Value, json};

use crate::common::Host;
use crate::common::blocked::Blocked;

const CR3: u64 = 0x10_0000;

/// Two vCPUs: the first one's paging is off, the second one uses the tables at [`CR3`].
#[derive(Default)]
struct Vmm {
    holder: Mutex<Option<u64>>,
    pauses: AtomicU32,
}

impl Vcpus for Vmm {
    fn answer(&self, question: VcpuQuestion) -> VcpuAnswer {
        let mut held = self.holder.lock().unwrap();
        match question {
            VcpuQuestion::Registers { .. } => {
                let second = VcpuRegisters {
                    cr0: 0x8005_0033,
                    cr3: CR3,
                    cr4: 0x6f0,
                    efer: Some(0xd01),
                    kernel_gs_base: Some(0x1234_5678),
                    lstar: Some(0xffff_ffff_8000_0123),
                    ..VcpuRegisters::default()
                };
                let first =
                    VcpuRegisters { cr0: 0x6000_0010, lstar: Some(0), ..VcpuRegisters::default() };
                VcpuAnswer::Registers { vcpus: vec![first, second], more: false }
            }
            VcpuQuestion::Pause { holder, is_new } if is_new || *held == Some(holder) => {
                self.pauses.fetch_add(u32::from(is_new), Ordering::Relaxed);
                *held = Some(holder);
                VcpuAnswer::Paused { was_running: true }
            }
            VcpuQuestion::Resume { holder } if *held == Some(holder) => {
                *held = None;
                VcpuAnswer::Resumed
            }
            _ => VcpuAnswer::NotPaused,
        }
    }

    fn resume_all(&self) {
        *self.holder.lock().unwrap() = None;
    }

    fn expire(&self) -> Option<Duration> {
        None
    }
}

/// With a page in the upper half.
fn host() -> (Host, Arc<Vmm>) {
    let vmm = Arc::new(Vmm::default());
    let host = Host::start_answering(&[Region { gpa: 0, len: 8 << 20, offset: 0, file: 0 }], &vmm);
    for (gpa, value) in [
        (CR3 + 511 * 8, 0x10_1003_u64),
        (0x10_1000 + 510 * 8, 0x10_2003),
        (0x10_2000, 0x10_3003),
        (0x10_3000, 0x40_0003),
    ] {
        host.put(gpa, &value.to_le_bytes());
    }
    host.put(0x40_0100, b"VCPU-ONE-SEES-IT");
    (host, vmm)
}

#[test]
fn addresses_are_looked_up_in_the_tables_that_a_vcpu_uses_now() {
    let (host, _vmm) = host();
    let line = host.ask(&["translate", "--target", "victim", "--vcpu", "1", "0xffffffff80000100"]);
    assert_eq!(line, "0xffffffff80000100  0x000000400100  4 KiB  rwx  kernel\n");
    let read = ["read", "--target", "victim", "--vcpu", "1", "0xffffffff80000100", "16", "--raw"];
    assert_eq!(host.ask(&read), "VCPU-ONE-SEES-IT");
    for (number, words) in [("0", "paging is off"), ("2", "the last one is 1")] {
        let ended = host.run(&["read", "--target", "victim", "--vcpu", number, "0", "16"]);
        assert_eq!((ended.code, ended.stderr.contains(words)), (Some(1), true), "{}", ended.stderr);
    }
    // A token does not give registers.
    let ended = host.look(&[], &["read", "--vcpu", "1", "0", "16"]);
    assert_eq!(
        (ended.code, ended.stderr.contains("--target NAME")),
        (Some(1), true),
        "{}",
        ended.stderr
    );
}

#[test]
fn what_is_read_by_the_tables_of_a_vcpu_is_of_one_boot() {
    let (host, _vmm) = host();
    // All RAM again, in large pages: more than a pipe takes.
    for n in 0..4 {
        host.put(0x10_2008 + n * 8, &((n << 21) | 0x83_u64).to_le_bytes());
    }
    let address = "0xffffffff80200000";
    let (read, mut translate) = (vec!["read", address, "8M", "--raw"], vec!["translate"]);
    translate.resize(2000, address);
    for verb in [read, translate] {
        let all = [&verb[..], &["--vcpu", "1", "--target", "victim"]].concat();
        let (ended, whole) = Blocked::start(host.command(&all)).end();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let blocked = Blocked::start(host.command(&all));
        host.reset();
        let (ended, bytes) = blocked.end();
        assert_eq!((ended.code, bytes.len()), (Some(4), whole.len()), "{}", ended.stderr);
        assert_eq!(
            ended.stderr,
            "error: victim: the guest was restarted while it was read: run the command again\n"
        );
    }
}

#[test]
fn a_dump_has_the_registers_that_the_vmm_shows_and_pauses_it() {
    let (host, vmm) = host();
    let core = host.path("core");
    let core = core.to_str().unwrap();
    let record: Value =
        host.ask_json(&["dump", core, "--target", "victim", "--format", "elf", "--pause"]);
    assert_eq!(record["registers"], json!({"vcpus": 2, "source": "kvmmem-vmm", "reason": null}));
    assert_eq!(record["pause"]["was_running"], true);
    assert_eq!((vmm.pauses.load(Ordering::Relaxed), *vmm.holder.lock().unwrap()), (1, None));
    let read = ["read", "--file", core, "--vcpu", "1", "0xffffffff80000100", "16", "--raw"];
    assert_eq!(host.ask(&read), "VCPU-ONE-SEES-IT");
    // The last word of the second vCPU's QEMU note, which is the last note.
    let file = std::fs::read(core).unwrap();
    assert!(file[..0x1000].windows(8).any(|word| word == 0x1234_5678_u64.to_le_bytes()));
}
