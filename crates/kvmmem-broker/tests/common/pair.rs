// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An introspector under the stock QEMU of this machine. It has no operating system: the test plays
//! its driver, by the descriptor's file and by the I/O ports that a guest's ACPI writes to.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem_abi::descriptor::{GENERATION_AT, SEEN_AT};
use kvmmem_broker::{Introspector, Limits, OpenError, OpenView};
use kvmmem_client::ClientError;
use kvmmem_client::admin::{GrantRequest, IntrospectorRequest, NewIntrospector, OnSilence, Rights};
use kvmmem_client::vmm::{Region, VmmLink};
use kvmmem_proto::guest::MappedBy;
use rustix::fs::{Mode, OFlags, SealFlags};
use serde_json::{Value, json};

use super::qemu::{Monitor, Qemu, wait_long};
use super::{TestBroker, caller, request};

/// The introspector's context id.
pub(crate) const CID: u32 = 77;

/// I/O ports of the machine `pc`'s PCI hot plug: the guest selects a bus, reads which of its slots
/// are to be ejected, and ejects them.
pub(crate) const BUS: u64 = 0xae10;
pub(crate) const REMOVED: u64 = 0xae04;
pub(crate) const EJECT: u64 = 0xae08;

/// RAM of the target, bytes.
pub(crate) const RAM: u64 = 1 << 20;

/// An introspector and a target.
pub(crate) struct Pair {
    pub(crate) broker: TestBroker,
    pub(crate) qemu: Qemu,
    pub(crate) introspector: Arc<Introspector>,
    pub(crate) target: Option<VmmLink>,
    /// QEMU serves one client of a monitor at a time.
    pub(crate) monitor: Arc<Mutex<Monitor>>,
    /// The firmware's.
    log: PathBuf,
}

impl Pair {
    /// One whose broker is patient, but lets tokens of KVMI's expire: that makes room in a list.
    pub(crate) fn start(on_silence: OnSilence) -> Option<Self> {
        let kvmi_lifetime = Limits::default().kvmi_lifetime;
        Self::start_with(on_silence, Limits { kvmi_lifetime, ..super::patient() })
    }

    pub(crate) fn start_with(on_silence: OnSilence, limits: Limits) -> Option<Self> {
        let broker = TestBroker::start_with(limits);
        broker.service.set_guest_port(None);
        let log = broker.directory.path().join("firmware.log");
        let debugcon = format!("file:{}", log.display());
        let firmware = ["-debugcon", &debugcon, "-global", "isa-debugcon.iobase=0x402"];
        let qemu = Qemu::start(
            &broker,
            "watcher",
            &[&["-machine", "pc", "-m", "64"], &firmware[..]].concat(),
        )?;
        wait_for_firmware(&log, 0);
        let added = add(&broker, &qemu, on_silence).unwrap();
        let vm = &added.target.identity;
        assert!(added.slot_count > 20 && vm.introspector && vm.cid == Some(CID));
        assert_eq!((vm.name.as_str(), added.target.pid), ("watcher", qemu.process.id()));
        let introspector = broker.service.introspector(CID).unwrap();
        let target = Some(target(&broker));
        let monitor = Arc::new(Mutex::new(qemu.monitor()));
        Some(Self { broker, qemu, introspector, target, monitor, log })
    }

    pub(crate) fn open(&self, request: &GrantRequest) -> Result<OpenView, OpenError> {
        let token = self.broker.grant(request).token;
        self.introspector.open(&token, &caller(), false, MappedBy::Module)
    }

    pub(crate) fn driver(&self) -> Driver {
        Driver::start(self.qemu.process.id(), &self.monitor, true)
    }

    /// A guest without the module: it releases devices, and says nothing.
    pub(crate) fn plain_guest(&self) -> Driver {
        Driver::start(self.qemu.process.id(), &self.monitor, false)
    }

    /// As a tool without the module.
    pub(crate) fn open_for_library(&self) -> Result<OpenView, OpenError> {
        let token = self.broker.grant(&request(Rights::ReadOnly)).token;
        self.introspector.open(&token, &caller(), false, MappedBy::Library)
    }

    /// The marks that QEMU has.
    pub(crate) fn marks(&self) -> usize {
        let objects =
            self.monitor.lock().unwrap().execute("qom-list", json!({ "path": "/objects" }));
        let is_mark = |name: &Value| name.as_str().unwrap().starts_with("kvmmem-mark-");
        objects.as_array().unwrap().iter().filter(|item| is_mark(&item["name"])).count()
    }

    pub(crate) fn retired(&self) -> Vec<String> {
        self.broker.admin().free_slots("watcher").unwrap().retired
    }

    pub(crate) fn command(&self, command: &str) -> Value {
        self.monitor.lock().unwrap().execute(command, json!({}))
    }

    /// Resets the VM.
    pub(crate) fn reset(&self) {
        let before = std::fs::read(&self.log).unwrap().len();
        self.command("system_reset");
        wait_for_firmware(&self.log, before);
    }

    /// How many devices and backends of ours there are.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let count = |path: &str| {
            let items = self.monitor.lock().unwrap().execute("qom-list", json!({ "path": path }));
            items.as_array().unwrap().iter().filter(|item| is_ours(&item["name"])).count()
        };
        (count("/machine/peripheral"), count("/objects"))
    }
}

/// Waits until the firmware has written more than `before` bytes and halts, having found nothing to
/// boot. A device that comes or goes under a vCPU that stores to another one can crash an emulating
/// QEMU before 8.1.1: it replaces the memory map before it flushes the vCPU's TLB (its commit
/// 0d58c660689f mends that).
fn wait_for_firmware(log: &Path, before: usize) {
    wait_long("the firmware to halt", || {
        let log = std::fs::read(log).unwrap_or_default();
        log.len() > before && log.trim_ascii_end().ends_with(b"No bootable device.")
    });
}

pub(crate) fn target(broker: &TestBroker) -> VmmLink {
    let ram = super::memfd(RAM, SealFlags::SHRINK);
    rustix::io::pwrite(&ram, b"tiger's memory", 0).unwrap();
    let regions = vec![Region { gpa: 0, len: RAM, offset: 0, file: 0 }];
    let registration = kvmmem_client::vmm::Registration { regions, ..super::target("tiger") };
    VmmLink::connect(&broker.path, registration, [ram]).unwrap()
}

pub(crate) fn add(
    broker: &TestBroker,
    qemu: &Qemu,
    on_silence: OnSilence,
) -> Result<NewIntrospector, ClientError> {
    let which = qemu.socket();
    broker.admin().add_introspector(&IntrospectorRequest {
        which,
        cid: Some(CID),
        name: None,
        on_silence,
        trusted: true,
    })
}

/// The introspector's driver: takes up what is plugged in, and releases what has ended.
pub(crate) struct Driver {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    pub(crate) fn start(pid: u32, monitor: &Arc<Mutex<Monitor>>, has_module: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let monitor = Arc::clone(monitor);
        let stopped = Arc::clone(&stop);
        let run = move || {
            while !stopped.load(Ordering::Relaxed) {
                for page in pages(pid).into_iter().filter(|_| has_module) {
                    let generation: u64 = number(&page, GENERATION_AT);
                    if generation.is_multiple_of(2) && generation != number(&page, SEEN_AT) {
                        write(&page, SEEN_AT, &generation.to_le_bytes());
                    }
                }
                let mut monitor = monitor.lock().unwrap();
                ports(&mut monitor, &format!("o /w {BUS:#x} 0"));
                let asked = ports(&mut monitor, &format!("i /w {REMOVED:#x}"));
                let asked = asked
                    .trim()
                    .rsplit_once("0x")
                    .map(|(_, mask)| u32::from_str_radix(mask, 16).unwrap());
                eject(&mut monitor, asked.unwrap());
                drop(monitor);
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        Self { stop, thread: Some(std::thread::spawn(run)) }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        // A second panic would end the program, and the tests beside this one.
        assert!(ended.is_ok() || std::thread::panicking(), "the driver has failed");
    }
}

/// The descriptor pages that a QEMU has.
pub(crate) fn pages(qemu: u32) -> Vec<OwnedFd> {
    let Ok(links) = std::fs::read_dir(format!("/proc/{qemu}/fd")) else { return Vec::new() };
    let mut paths: Vec<_> = links.filter_map(|link| Some(link.ok()?.path())).collect();
    paths.retain(|path| {
        std::fs::read_link(path)
            .is_ok_and(|link| link.to_string_lossy().contains("kvmmem-descriptor"))
    });
    let open = |path| rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok();
    paths.into_iter().filter_map(open).collect()
}

pub(crate) fn number(page: &OwnedFd, at: usize) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::pread(page, &mut bytes, at as u64).unwrap();
    u64::from_le_bytes(bytes)
}

pub(crate) fn state(page: &OwnedFd) -> u32 {
    u32::try_from(number(page, 24) & 0xffff_ffff).unwrap()
}

pub(crate) fn write(page: &OwnedFd, at: usize, bytes: &[u8]) {
    rustix::io::pwrite(page, bytes, at as u64).unwrap();
}

/// Ejects slots, by a mask of their numbers.
pub(crate) fn eject(monitor: &mut Monitor, slots: u32) {
    if slots != 0 {
        ports(monitor, &format!("o /w {BUS:#x} 0"));
        ports(monitor, &format!("o /w {EJECT:#x} {slots:#x}"));
    }
}

/// The slots that views are in.
pub(crate) fn slots(monitor: &mut Monitor) -> u32 {
    let devices = pci(monitor);
    let ours = devices.iter().filter(|device| is_ours(&device["qdev_id"]));
    ours.fold(0, |slots, device| slots | 1 << device["slot"].as_u64().unwrap())
}

/// Reads or writes an I/O port, as a guest does.
pub(crate) fn ports(monitor: &mut Monitor, line: &str) -> String {
    let answer = monitor.execute("human-monitor-command", json!({ "command-line": line }));
    answer.as_str().unwrap().to_owned()
}

pub(crate) fn pci(monitor: &mut Monitor) -> Vec<Value> {
    monitor.execute("query-pci", json!({}))[0]["devices"].as_array().unwrap().clone()
}

pub(crate) fn is_ours(id: &Value) -> bool {
    id.as_str().is_some_and(|id| id.starts_with("kvmmem-view-"))
}
