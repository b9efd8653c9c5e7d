// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A target made of nothing but a memory file, and a machine that runs a bare guest.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvmmem_abi::errno::KvmError;
use kvmmem_broker::{Limits, Server};
use kvmmem_client::admin::{Admin, GrantRequest, NewGrant};
use kvmmem_client::vmm::{Region, Rights, Scope, VmIdentity, VmmLink};
use kvmmem_proto::map::MemoryMap;
use kvmmem_sys::ram::GuestRam;
use kvmmem_vmm::introspect::source::TargetMemory;
use kvmmem_vmm::{
    Control, HypercallMethod, ResetPolicy, SerialConfig, VmConfig, VmExit, VmStatus, VmmError,
};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{Guest, Method};
use crate::tokens::OneToken;

/// The token that opens the target, as often as it is used.
pub(crate) const TOKEN: [u64; 4] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 3, u64::MAX];

/// The target's UUID.
pub(crate) const TARGET_UUID: [u8; 16] = *b"a target's uuid.";

const TARGET_BYTES: u64 = 1 << 20;
/// A page of the target that its memory map leaves out.
pub(crate) const TARGET_HOLE: u64 = 0x8_0000;

/// Where the target's RAM is, in its file as well.
pub(crate) const TARGET_RANGES: [(u64, u64); 2] =
    [(0, TARGET_HOLE), (TARGET_HOLE + 4096, TARGET_BYTES)];

/// The target's memory.
pub(crate) struct Target(Arc<GuestRam>, MemoryMap);

impl Target {
    pub(crate) fn new() -> Arc<Self> {
        Self::with_ranges(TARGET_BYTES, &TARGET_RANGES)
    }

    /// A target with RAM in these ranges, start and end, alone, in a file of `bytes` bytes. One of
    /// less than 2 MiB has no large pages, which would have data everywhere.
    pub(crate) fn with_ranges(bytes: u64, ranges: &[(u64, u64)]) -> Arc<Self> {
        let regions = ranges
            .iter()
            .map(|&(gpa, end)| Region { gpa, len: end - gpa, offset: gpa, file: 0 })
            .collect();
        let ram = Arc::new(GuestRam::new(bytes).unwrap());
        Arc::new(Self(ram, MemoryMap::new(regions).unwrap()))
    }

    /// The same memory with RAM in other ranges.
    pub(crate) fn with_other_ranges(&self, ranges: &[(u64, u64)]) -> Arc<Self> {
        let regions = ranges
            .iter()
            .map(|&(gpa, end)| Region { gpa, len: end - gpa, offset: gpa, file: 0 })
            .collect();
        Arc::new(Self(self.0.clone(), MemoryMap::new(regions).unwrap()))
    }

    pub(crate) fn write(&self, gpa: u64, value: u64) {
        self.0.memory().write_obj(value, GuestAddress(gpa)).unwrap();
    }

    /// Bytes of it that the host holds.
    pub(crate) fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let file = std::fs::File::from(self.0.fd().try_clone_to_owned().unwrap());
        file.metadata().unwrap().blocks() * 512
    }

    pub(crate) fn read(&self, gpa: u64) -> u64 {
        self.0.memory().read_obj(GuestAddress(gpa)).unwrap()
    }
}

impl TargetMemory for Target {
    fn file(&self, index: u32) -> Option<BorrowedFd<'_>> {
        (index == 0).then(|| self.0.fd())
    }

    fn id(&self) -> u64 {
        1
    }

    fn uuid(&self) -> [u8; 16] {
        TARGET_UUID
    }

    fn map(&self) -> &MemoryMap {
        &self.1
    }
}

/// Whether this host has a usable `/dev/kvm`; says so when it has not.
pub(crate) fn has_kvm() -> bool {
    let found = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &found {
        eprintln!(
            "skipped: /dev/kvm cannot be opened ({error}): run on a host with KVM, as a member of group kvm"
        );
    }
    found.is_ok()
}

/// Whether this host has a usable `/dev/kvm` with read-only memory slots; says so when it has not.
pub(crate) fn has_windows() -> bool {
    if !has_kvm() {
        return false;
    }
    let has_windows = kvm_ioctls::Kvm::new().unwrap().check_extension(kvm_ioctls::Cap::ReadonlyMem);
    if !has_windows {
        eprintln!(
            "skipped: KVM has no read-only memory slots (KVM_CAP_READONLY_MEM): run on an x86 host"
        );
    }
    has_windows
}

/// How a bare guest's machine ended, and what the guest reported.
pub(crate) struct Outcome {
    pub(crate) exit: VmExit,
    pub(crate) values: Vec<u64>,
    /// What was told of the machine.
    pub(crate) events: Vec<VmStatus>,
    /// How many tokens were asked for.
    pub(crate) asked: usize,
}

/// The ways of hypercalls that this host has; none, with the reason printed, where there is no
/// usable `/dev/kvm`.
pub(crate) fn methods() -> Vec<Method> {
    if !has_kvm() {
        return Vec::new();
    }
    if kvmmem_sys::xen::can_intercept(&kvm_ioctls::Kvm::new().unwrap()) {
        return vec![Method::Doorbell, Method::Vmmcall];
    }
    eprintln!(
        "skipped: KVM cannot forward hypercalls (by the doorbell alone): run on a kernel with CONFIG_KVM_XEN"
    );
    vec![Method::Doorbell]
}

/// As [`methods`], where KVM has the read-only memory slots that windows need.
pub(crate) fn window_methods() -> Vec<Method> {
    if has_windows() { methods() } else { Vec::new() }
}

/// Runs `guest` as an introspector in front of `target`.
pub(crate) fn run(guest: &Guest, target: &Arc<Target>) -> Outcome {
    run_with(guest, target, |_| {}).unwrap()
}

/// As [`run`], with a changed configuration.
pub(crate) fn run_with(
    guest: &Guest,
    target: &Arc<Target>,
    change: impl FnOnce(&mut VmConfig),
) -> Result<Outcome, VmmError> {
    run_with_tokens(guest, &OneToken::new(target.clone(), Scope::whole(Rights::ReadWrite)), change)
}

/// As [`run_with`], with tokens that others watch.
pub(crate) fn run_with_tokens(
    guest: &Guest,
    tokens: &Arc<OneToken>,
    change: impl FnOnce(&mut VmConfig),
) -> Result<Outcome, VmmError> {
    let directory = tempfile::tempdir().unwrap();
    let serial = directory.path().join("serial");
    let mut config = config(guest, directory.path());
    change(&mut config);
    let events = Arc::new(Mutex::new(Vec::new()));
    let watch = events.clone();
    let control = Control::new()
        .with_tokens(tokens.clone())
        .on_status(move |status| watch.lock().unwrap().push(status.clone()));
    let exit = kvmmem_vmm::run(config, control)?;
    let events = std::mem::take(&mut *events.lock().unwrap());
    Ok(Outcome { exit, values: values(&serial), events, asked: tokens.asked() })
}

/// A result as the guest's 64-bit register has it.
pub(crate) fn refused(error: KvmError) -> u64 {
    (-i64::from(error.number())).cast_unsigned()
}

/// Runs the guest that `make` makes of a token for reading and writing, good for `uses` uses,
/// minted by a broker that serves the introspector and `target`.
///
/// Meanwhile another thread does `meanwhile`, as the broker's administrator, with the token's
/// grant.
pub(crate) fn run_with_broker(
    target: &Target,
    uses: u32,
    make: impl FnOnce([u64; 4]) -> Guest,
    meanwhile: impl FnOnce(&mut Admin, u64) + Send,
) -> Outcome {
    let run = |config| kvmmem_vmm::run(config, Control::new()).unwrap();
    let (exit, values) = launch_with_broker(target, uses, make, meanwhile, run);
    Outcome { exit, values, events: Vec::new(), asked: 1 }
}

/// As [`run_with_broker`], with a machine that `launch` runs; returns what that returns, and what
/// the guest reported.
pub(crate) fn launch_with_broker<T>(
    target: &Target,
    uses: u32,
    make: impl FnOnce([u64; 4]) -> Guest,
    meanwhile: impl FnOnce(&mut Admin, u64) + Send,
    launch: impl FnOnce(VmConfig) -> T,
) -> (T, Vec<u64>) {
    const NAME: &str = "target";
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("broker");
    // A slow host is waited for.
    let patience = Duration::from_secs(60);
    let limits = Limits { confirmation: patience, ..Limits::default() };
    let server = Server::bind_with(&socket, None, limits).unwrap();
    let (stop, stopped) = UnixStream::pair().unwrap();
    let serving = std::thread::spawn(move || server.run(stopped.as_fd()));

    let registration = VmIdentity::target(NAME, Uuid::from_bytes([7; 16]))
        .registered(vec![Region { gpa: 0, len: TARGET_BYTES, offset: 0, file: 0 }]);
    let ram = target.0.fd().try_clone_to_owned().unwrap();
    let link = VmmLink::connect(&socket, registration, Some(ram)).unwrap();
    let mut admin = Admin::connect(&socket).unwrap();
    admin.limit_answers(patience).unwrap();
    let request = GrantRequest {
        target: NAME.into(),
        spans: None,
        rights: Rights::ReadWrite,
        // A slow host does not let it expire.
        ttl_ms: 60_000,
        uses,
        holder: None,
        label: None,
    };
    let NewGrant { grant, token } = admin.grant(&request).unwrap();

    let mut config = config(&make(token.words()), directory.path());
    config.broker = Some(socket);
    let serial = directory.path().join("serial");
    let launched = std::thread::scope(|scope| {
        scope.spawn(|| meanwhile(&mut admin, grant));
        launch(config)
    });
    drop((admin, link, stop));
    serving.join().unwrap().unwrap();
    (launched, values(&serial))
}

/// What the guest reported.
pub(crate) fn values(serial: &Path) -> Vec<u64> {
    let output = std::fs::read(serial).unwrap_or_default();
    output.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

/// Waits until `is_so`; for so long that a machine that gets there does.
pub(crate) fn wait_until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited for too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `guest` on two CPUs until it has reported something, and is stopped from outside.
pub(crate) fn run_stopped(guest: &Guest) -> VmExit {
    let directory = tempfile::tempdir().unwrap();
    let serial = directory.path().join("serial");
    let mut config = config(guest, directory.path());
    config.vcpus = 2;
    let control = Control::new();
    let stop = control.stop_handle();
    let stopper = std::thread::spawn(move || {
        wait_until(|| !values(&serial).is_empty());
        stop.stop();
    });
    let exit = kvmmem_vmm::run(config, control).unwrap();
    stopper.join().unwrap();
    exit
}

/// An introspector that runs `guest`, with its files in `directory`.
pub(crate) fn config(guest: &Guest, directory: &Path) -> VmConfig {
    let kernel = directory.join("guest.elf");
    guest.write_elf(&kernel);
    config_of(kernel, guest.method(), directory)
}

/// An introspector that runs `kernel`.
pub(crate) fn config_of(kernel: PathBuf, method: Method, directory: &Path) -> VmConfig {
    VmConfig {
        kernel,
        initrd: None,
        cmdline: String::new(),
        memory_bytes: 16 << 20,
        vcpus: 1,
        disks: Vec::new(),
        cid: None,
        serial: SerialConfig::File(directory.join("serial")),
        name: "bare".into(),
        uuid: [1; 16],
        broker: None,
        introspectable: false,
        introspector: true,
        hypercalls: match method {
            Method::Doorbell => HypercallMethod::Port,
            Method::Vmmcall => HypercallMethod::Xen,
        },
        window: true,
        reset: ResetPolicy::Exit,
        // It would bind the other tests of this process.
        sandbox: false,
    }
}
