// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views whose devices are ordinary files: unlike a PCI device's, their mappings can be looked at
//! after the device has gone.

use std::cell::Cell;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvmmem_abi::descriptor::{
    COMPLAINT_AT, COMPLAINT_INVALID, COMPLAINT_NO_ADDRESS, Descriptor, DescriptorError,
    GENERATION_AT, SEEN_ALL, SEEN_AT, SIZE, SLOT_AT, WindowRange,
};
use kvmmem_abi::native::{RIGHT_READ, RIGHT_WRITE, STATE_GONE, STATE_OPEN, STATE_REVOKED};
use tempfile::TempDir;

use super::*;
use crate::view::mapping::{Mapping, MappingError};

const PAGE: u64 = 0x1000;
const PAGE_SIZE: usize = 0x1000;

/// The permission that a device's file has after the device has gone.
const GONE: u32 = 0o100;

/// Longer than any machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

thread_local! {
    /// How often this thread has asked.
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

fn is_alive(file: &OwnedFd) -> bool {
    ASKED.set(ASKED.get() + 1);
    rustix::fs::fstat(file).unwrap().st_mode & GONE == 0
}

/// A virtual machine into which views are plugged.
struct Machine {
    folder: TempDir,
    ticket: Token,
}

impl Machine {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), ticket: Token::new([1, 2, 3, 4]) }
    }

    fn path(&self, function: &str, file: &str) -> PathBuf {
        self.folder.path().join(format!("0000:{function}")).join(file)
    }

    /// A function of `ivshmem` with this memory.
    fn plug(&self, function: &str, bytes: &[u8]) {
        fs::create_dir(self.path(function, "")).unwrap();
        let end = 0x8000_0000 + bytes.len() - 1;
        let lines = [
            "0x00000000febf1000 0x00000000febf10ff 0x0000000000040200".to_owned(),
            "0x0000000000000000 0x0000000000000000 0x0000000000000000".to_owned(),
            format!("{:#018x} {end:#018x} 0x000000000014220c", 0x8000_0000u64),
        ];
        let texts = [
            ("vendor", "0x1af4\n".to_owned()),
            ("device", "0x1110\n".to_owned()),
            ("enable", "0\n".to_owned()),
            ("resource", lines.join("\n") + "\n"),
        ];
        for (file, text) in texts {
            fs::write(self.path(function, file), text).unwrap();
        }
        fs::write(self.path(function, "resource2"), bytes).unwrap();
    }

    fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.ticket.to_bytes()).into()
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor {
            generation: 2,
            state: STATE_OPEN,
            rights: RIGHT_READ,
            token_digest: self.digest(),
            uuid: [0x1d; 16],
            instance: 5,
            ..Descriptor::default()
        }
    }

    fn plug_head(&self, function: &str, descriptor: &Descriptor, ranges: &[WindowRange]) {
        let mut page = [0; SIZE];
        descriptor.write(ranges, &mut page);
        let mut bytes = vec![0; PAGE_SIZE];
        bytes[..SIZE].copy_from_slice(&page);
        self.plug(function, &bytes);
    }

    /// A view of two ranges in one window, whose bytes are all `byte`.
    fn plug_view(&self, byte: u8) {
        self.plug("01:00.1", &[byte; 0x4000]);
        self.plug_head("01:00.0", &self.descriptor(), &RANGES);
    }

    fn attach(&self) -> Result<(Arc<SysfsView>, UnixStream), SysfsError> {
        self.attach_for(Access::ReadOnly, PATIENCE)
    }

    fn attach_for(
        &self,
        access: Access,
        limit: Duration,
    ) -> Result<(Arc<SysfsView>, UnixStream), SysfsError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bus = Bus { folder: self.folder.path(), is_alive, limit };
        let connection = GuestConnection::of(ours.into(), self.ticket.clone());
        Ok((SysfsView::open(&bus, connection, access)?, theirs))
    }

    fn bar(&self, function: &str) -> fs::File {
        let path = self.path(function, "resource2");
        fs::OpenOptions::new().read(true).write(true).custom_flags(0).open(path).unwrap()
    }

    fn head(&self) -> Host {
        Host(self.bar("01:00.0"))
    }

    /// The device goes; what is mapped of it is not what was there.
    fn unplug(&self, function: &str) {
        let path = self.path(function, "resource2");
        fs::set_permissions(path, fs::Permissions::from_mode(0o600 | GONE)).unwrap();
    }
}

const RANGES: [WindowRange; 2] = [
    WindowRange { gpa: 0, len: 0x2000, offset: 0, window: 1 },
    WindowRange { gpa: 0x10_0000, len: 0x2000, offset: 0x2000, window: 1 },
];

/// The host's side of a descriptor page.
struct Host(fs::File);

impl Host {
    fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, at as u64).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn complaint(&self) -> u32 {
        u32::try_from(self.word(COMPLAINT_AT - 4) >> 32).unwrap()
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        self.0.write_all_at(bytes, at as u64).unwrap();
    }

    /// Says another state.
    fn say(&self, state: u32) {
        let old = self.word(GENERATION_AT);
        self.write(GENERATION_AT, &(old | 1).to_le_bytes());
        self.write(24, &state.to_le_bytes());
        self.write(GENERATION_AT, &(old + 2).to_le_bytes());
    }

    fn wait_for_seen(&self, wanted: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.word(SEEN_AT) != wanted {
            assert!(Instant::now() < deadline, "{:#x}", self.word(SEEN_AT));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn map(view: &Arc<SysfsView>, range: Range) -> Result<Mapping, ViewError> {
    let memory = view.map(ViewOperation::Map { gpa: range.gpa, len: range.len }, range)?;
    Ok(Mapping::new(range.gpa, memory, Arc::clone(view) as _))
}

fn is_revoked<T: std::fmt::Debug>(result: Result<T, ViewError>) -> bool {
    matches!(result, Err(ViewError::Revoked { .. }))
}

fn is_gone<T: std::fmt::Debug>(result: Result<T, ViewError>) -> bool {
    matches!(result, Err(ViewError::Gone { .. }))
}

#[test]
fn a_view_is_read_and_mapped_until_it_is_revoked() {
    let machine = Machine::new();
    machine.plug_view(b'a');
    machine.bar("01:00.1").write_all_at(b"range", 0x2000).unwrap();
    let (view, _host) = machine.attach().unwrap();
    let host = machine.head();
    host.wait_for_seen(2);
    assert_eq!(fs::read_to_string(machine.path("01:00.1", "enable")).unwrap(), "1");
    let status = view.status().unwrap();
    assert_eq!((status.state, status.generation, status.uuid), (State::Open, 2, [0x1d; 16]));
    assert_eq!(status.ranges[1], Range { gpa: 0x10_0000, len: 0x2000 });
    assert_eq!(view.instance().unwrap(), Some(5));
    let mut bytes = [0; 5];
    view.read_at(0x10_0000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"range");
    assert!(matches!(view.read_at(0x1ffe, &mut bytes), Err(ViewError::Hole { gpa: 0x2000, .. })));
    assert!(matches!(view.write_at(0, b"x"), Err(ViewError::ReadOnly { .. })));
    let next = view.data_from(ViewOperation::Seek { gpa: 0x1000 }, 0x1000).unwrap();
    assert_eq!(next, Some(Range { gpa: 0x1000, len: 0x1000 }));
    let mapping = map(&view, Range { gpa: 0x10_0000, len: PAGE }).unwrap();
    mapping.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"range");
    assert_eq!(mapping.read_u8(0).unwrap(), b'r');
    assert!(matches!(map(&view, Range { gpa: 0, len: 3 * PAGE }), Err(ViewError::Hole { .. })));

    // The host resets the target, which changes nothing of where its memory is.
    host.write(120, &6u64.to_le_bytes());
    host.say(STATE_OPEN);
    host.wait_for_seen(4);
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Changed));
    assert_eq!(view.instance().unwrap(), Some(6));
    mapping.read(0, &mut bytes).unwrap();

    host.say(STATE_REVOKED);
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Revoked));
    host.wait_for_seen(SEEN_ALL);
    assert!(is_revoked(view.read_at(0, &mut bytes)));
    assert!(is_revoked(map(&view, Range { gpa: 0, len: PAGE })));
    assert_eq!(mapping.read(0, &mut bytes), Err(MappingError::Lost { gpa: 0x10_0000 }));
    assert_eq!(mapping.read_u64(8), Err(MappingError::Lost { gpa: 0x10_0008 }));
    assert_eq!(view.status().unwrap().ranges, []);
}

#[test]
fn a_revocation_right_after_a_reset_does_not_hide_it() {
    let machine = Machine::new();
    machine.plug_view(b'a');
    let (view, _theirs) = machine.attach().unwrap();
    assert_eq!(view.instance().unwrap(), Some(5));
    let host = machine.head();
    host.write(GENERATION_AT, &3u64.to_le_bytes());
    host.write(120, &6u64.to_le_bytes());
    host.write(24, &STATE_REVOKED.to_le_bytes());
    host.write(GENERATION_AT, &6u64.to_le_bytes());
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Revoked));
    assert_eq!(view.instance().unwrap(), Some(6));
}

#[test]
fn the_hosts_end_of_the_connection_and_the_tools_end_the_view() {
    for by_host in [true, false] {
        let machine = Machine::new();
        machine.plug_view(b'a');
        let (view, theirs) = machine.attach().unwrap();
        let mapping = map(&view, Range { gpa: 0, len: PAGE }).unwrap();
        if by_host {
            drop(theirs);
            assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Gone));
        } else {
            view.detach().unwrap();
        }
        assert!(is_gone(view.read_at(0, &mut [0])));
        assert_eq!(mapping.read_u8(0), Err(MappingError::Lost { gpa: 0 }));
        machine.head().wait_for_seen(SEEN_ALL);
        // No other process gets it.
        assert!(matches!(machine.attach(), Err(SysfsError::Taken)));
    }
    // A mapping keeps the view.
    let machine = Machine::new();
    machine.plug_view(b'a');
    let (view, mut theirs) = machine.attach().unwrap();
    let mapping = map(&view, Range { gpa: 0, len: PAGE }).unwrap();
    drop(view);
    assert_eq!(mapping.read_u8(5).unwrap(), b'a');
    drop(mapping);
    // The host takes the end of the connection for an acknowledgement as well.
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    assert_eq!(machine.head().word(SEEN_AT), SEEN_ALL);
}

/// A child that was forked has the connection's file, too.
#[test]
fn a_view_that_has_ended_ends_the_connection_of_all_processes() {
    let machine = Machine::new();
    machine.plug_view(b'a');
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let _child = ours.try_clone().unwrap();
    let bus = Bus { folder: machine.folder.path(), is_alive, limit: PATIENCE };
    let connection = GuestConnection::of(ours.into(), machine.ticket.clone());
    drop(SysfsView::open(&bus, connection, Access::ReadOnly).unwrap());
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
}

/// While it is read, the device goes and another view's bytes are where its mappings lead.
#[test]
fn no_byte_of_what_comes_after_the_device_is_believed() {
    for _ in 0..20 {
        let machine = Machine::new();
        machine.plug_view(b'a');
        let (view, _theirs) = machine.attach().unwrap();
        let mapping = map(&view, Range { gpa: 0, len: 2 * PAGE }).unwrap();
        let begun = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut bytes = [0; 0x1800];
                let (mut reads, mut last) = (0, Ok(()));
                while last.is_ok() {
                    bytes.fill(0);
                    last = view.read_at(0x10_0000, &mut bytes);
                    assert!(last.is_err() || bytes == [b'a'; 0x1800]);
                    reads += 1;
                    begun.store(reads > 3, Ordering::Relaxed);
                }
                assert!(is_gone(last));
            });
            scope.spawn(|| {
                while let Ok(byte) = mapping.read_u8(0x1234) {
                    assert_eq!(byte, b'a');
                }
            });
            while !begun.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            // In the kernel's order.
            machine.unplug("01:00.0");
            machine.unplug("01:00.1");
            machine.bar("01:00.1").write_all_at(&[b'b'; 0x4000], 0).unwrap();
            machine.head().say(STATE_OPEN);
        });
        // To that page, which is the next view's, nothing is written.
        assert_eq!(machine.head().word(SEEN_AT), 2);
    }
}

#[test]
fn a_host_that_stops_in_the_midst_of_a_change_is_waited_for() {
    let machine = Machine::new();
    machine.plug_view(b'a');
    let (view, _theirs) = machine.attach().unwrap();
    let host = machine.head();
    host.write(GENERATION_AT, &3u64.to_le_bytes());
    let error = view.read_at(0, &mut [0]).unwrap_err();
    assert_eq!(error.errno(), Some(rustix::io::Errno::AGAIN.raw_os_error()), "{error}");
    assert_eq!(view.status().unwrap().state, State::Open);
    host.write(GENERATION_AT, &4u64.to_le_bytes());
    view.read_at(0, &mut [0]).unwrap();
    host.wait_for_seen(4);
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Changed));
    // One that goes back lies.
    host.write(GENERATION_AT, &2u64.to_le_bytes());
    assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Gone));
    assert_eq!(host.complaint(), COMPLAINT_INVALID);
}

#[test]
fn windows_of_several_slots_are_mapped_in_one_piece() {
    let machine = Machine::new();
    let ranges: Vec<_> = (0..9u64)
        .map(|number| WindowRange {
            gpa: number * PAGE,
            len: PAGE,
            offset: 0,
            window: u32::try_from(number).unwrap() + 1,
        })
        .collect();
    for number in 0..9u8 {
        let (slot, function) = (2 - number / 7, 1 + number % 7);
        machine.plug(&format!("0{slot}:00.{function}"), &[b'a' + number; PAGE_SIZE]);
    }
    let descriptor = Descriptor { rights: RIGHT_READ | RIGHT_WRITE, ..machine.descriptor() };
    machine.plug_head("01:00.0", &descriptor, &[]);
    Host(machine.bar("01:00.0")).write(SLOT_AT, &1u32.to_le_bytes());
    machine.plug_head("02:00.0", &descriptor, &ranges);
    let (view, _theirs) = machine.attach_for(Access::Granted, PATIENCE).unwrap();
    let mut bytes = vec![0; 9 * PAGE_SIZE];
    view.read_at(0, &mut bytes).unwrap();
    let mapping = map(&view, Range { gpa: 0, len: 9 * PAGE }).unwrap();
    let mut mapped = bytes.clone();
    mapping.read(0, &mut mapped).unwrap();
    assert!(bytes == mapped);
    let expected = |at: usize| b'a' + u8::try_from(at / PAGE_SIZE).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
    view.write_at(7 * PAGE - 1, b"xy").unwrap();
    mapping.write(8 * PAGE, b"z").unwrap();
    let mut written = [0; 1];
    machine.bar("01:00.1").read_exact_at(&mut written, 0).unwrap();
    assert_eq!(&written, b"y");
    assert_eq!(mapping.read_u8(7 * PAGE - 1).unwrap(), b'x');
    assert_eq!(mapping.read_u8(8 * PAGE).unwrap(), b'z');
    // Each access takes a system call for each window, however much of that it reads.
    for (offset, len, windows) in [(8, 8, 1), (0, PAGE_SIZE, 1), (0, 9 * PAGE_SIZE, 9)] {
        let buf = bytes.get_mut(..len).unwrap();
        ASKED.set(0);
        mapping.read(offset, buf).unwrap();
        assert_eq!(ASKED.replace(0), windows);
        view.read_at(offset, buf).unwrap();
        assert_eq!(ASKED.get(), windows);
    }
    // The part that has gone, and no other.
    machine.unplug("01:00.2");
    assert_eq!(mapping.read_u8(8 * PAGE), Err(MappingError::Lost { gpa: 8 * PAGE }));
}

/// `virtio-pci` looks at each device of QEMU's vendor, and has it meanwhile. A device without an
/// address for each of its BARs cannot be enabled.
#[test]
fn a_device_that_the_kernel_is_still_adding_is_waited_for() {
    for (file, other) in [("driver", "../drivers/virtio-pci"), ("enable", "/dev/full")] {
        let machine = Machine::new();
        machine.plug_view(b'a');
        let link = machine.path("01:00.1", file);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(other, &link).unwrap();
        std::thread::scope(|scope| {
            let attach = scope.spawn(|| machine.attach().map(drop));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!attach.is_finished(), "{:?}", attach.join());
            fs::remove_file(link).unwrap();
            attach.join().unwrap().unwrap();
        });
    }
}

#[test]
fn what_cannot_be_used_is_refused_with_its_reason() {
    let quick = Duration::from_millis(30);
    let refused = |machine: &Machine| machine.attach_for(Access::Granted, quick).unwrap_err();
    let machine = Machine::new();
    assert!(matches!(refused(&machine), SysfsError::Absent));
    // Another view's, and a device that is none of ours.
    machine.plug_head(
        "01:00.0",
        &Descriptor { token_digest: [9; 32], ..machine.descriptor() },
        &[],
    );
    machine.plug("02:00.0", &[0; 0x1000]);
    machine.plug("03:00.0", &[0; 0x2000]);
    assert!(matches!(refused(&machine), SysfsError::Absent));

    // A window is missing; it has no address; it has a driver.
    let machine = Machine::new();
    machine.plug_head("01:00.0", &machine.descriptor(), &RANGES);
    assert!(matches!(refused(&machine), SysfsError::Absent));
    machine.plug("01:00.1", &[0; 0x4000]);
    let resource = fs::read_to_string(machine.path("01:00.1", "resource")).unwrap();
    fs::write(machine.path("01:00.1", "resource"), "0x0 0x0 0x0\n".repeat(3)).unwrap();
    assert!(
        matches!(refused(&machine), SysfsError::NoAddress { device } if device == "0000:01:00.1")
    );
    assert_eq!(machine.head().complaint(), COMPLAINT_NO_ADDRESS);
    fs::write(machine.path("01:00.1", "resource"), resource).unwrap();
    for function in ["01:00.1", "01:00.0"] {
        let link = machine.path(function, "driver");
        std::os::unix::fs::symlink("../drivers/uio_pci_generic", &link).unwrap();
        let error = refused(&machine);
        assert!(
            matches!(&error, SysfsError::Bound { driver, .. } if driver == "uio_pci_generic"),
            "{error}"
        );
        fs::remove_file(link).unwrap();
    }
    machine.attach_for(Access::Granted, PATIENCE).unwrap();
}

/// As that of another view, which the module had and which is being unplugged.
#[test]
fn a_device_that_cannot_be_mapped_hinders_no_other_view() {
    let machine = Machine::new();
    machine.plug("00:05.0", &[0; PAGE_SIZE]);
    let file = machine.path("00:05.0", "resource2");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let quick = Duration::from_millis(30);
    let error = machine.attach_for(Access::ReadOnly, quick).unwrap_err();
    assert!(matches!(&error, SysfsError::System { device, .. } if device == "0000:00:05.0"));
    machine.plug_view(b'a');
    machine.attach().unwrap();
}

#[test]
fn a_descriptor_that_ends_or_cannot_be_ends_the_view() {
    for (at, bytes, state) in [
        (24, STATE_GONE.to_le_bytes(), Event::Gone),
        (28, 7u32.to_le_bytes(), Event::Gone),
        (0, 0u32.to_le_bytes(), Event::Gone),
        (32, 0u32.to_le_bytes(), Event::Gone),
    ] {
        let machine = Machine::new();
        machine.plug_view(b'a');
        let (view, _theirs) = machine.attach().unwrap();
        let host = machine.head();
        host.write(GENERATION_AT, &3u64.to_le_bytes());
        host.write(at, &bytes);
        host.write(GENERATION_AT, &4u64.to_le_bytes());
        assert_eq!(view.wait(PATIENCE).unwrap(), Some(state), "{at}");
        host.wait_for_seen(SEEN_ALL);
    }
    let machine = Machine::new();
    machine.plug("01:00.1", &[0; 0x4000]);
    let descriptor = Descriptor { window_gpa: PAGE, window_len: PAGE, ..machine.descriptor() };
    machine.plug_head("01:00.0", &descriptor, &RANGES);
    let error = machine.attach().unwrap_err();
    assert!(matches!(error, SysfsError::Invalid(DescriptorError::Header)), "{error}");
    assert_eq!(machine.head().complaint(), COMPLAINT_INVALID);
}

/// What the module's selftest tries as well.
const MALFORMED: &str = include_str!("../../../../kvmmem-abi/tests/malformed_descriptors.inc");

/// Offset, size and value of each entry.
fn malformed() -> Vec<(usize, usize, u64)> {
    let entries = MALFORMED.lines().filter_map(|line| line.strip_prefix("MALFORMED("));
    let entry = |entry: &str| {
        let (field, value) = entry.strip_suffix(')').unwrap().split_once(", ").unwrap();
        let (at, size) = match field {
            "magic" => (0, 8),
            "version" => (8, 4),
            "range_size" => (12, 4),
            "state" => (24, 4),
            "rights" => (28, 4),
            "window_gpa" => (80, 8),
            "window_len" => (88, 8),
            "range_count" => (96, 4),
            "ranges[1].gpa" => (160, 8),
            "ranges[1].len" => (168, 8),
            "ranges[1].offset" => (176, 8),
            other => panic!("{other}"),
        };
        (at, size, sum(value))
    };
    entries.map(entry).collect()
}

/// The value of `[-]TERM [+ TERM]`.
fn sum(text: &str) -> u64 {
    let term = |word: &str| match word {
        "KVMMEM_DESCRIPTOR_MAGIC" => kvmmem_abi::descriptor::MAGIC,
        "KVMMEM_RIGHT_WRITE" => u64::from(RIGHT_WRITE),
        "PAGE" => PAGE,
        "WINDOW" => 0x2000_0000,
        "WINDOW_SIZE" => 0x4000,
        "LOW" => RANGES[0].gpa,
        "HUGE" => RANGES[1].gpa,
        "HUGE_AT" => RANGES[1].offset,
        digits => digits.parse().unwrap(),
    };
    let (sign, words) = text.strip_prefix('-').map_or((1, text), |words| (-1, words));
    let value = words.split(" + ").fold(0, |sum, word| sum + term(word));
    if sign < 0 { value.wrapping_neg() } else { value }
}

#[test]
fn what_makes_the_module_refuse_a_descriptor_does_so_here() {
    let all = malformed();
    assert!(all.len() > 20);
    for (at, size, value) in all {
        let bytes = &value.to_le_bytes()[..size];
        let machine = Machine::new();
        machine.plug_view(b'a');
        machine.head().write(at, bytes);
        let refused = machine.attach_for(Access::Granted, Duration::from_millis(20)).unwrap_err();
        // By magic and version devices are told from others.
        let is_right = match at {
            0 | 8 => matches!(refused, SysfsError::Absent),
            _ => matches!(refused, SysfsError::Invalid(_)),
        };
        assert!(is_right, "{at} {value:#x}: {refused:?}");

        let machine = Machine::new();
        machine.plug_view(b'a');
        let (view, _theirs) = machine.attach().unwrap();
        let host = machine.head();
        host.write(GENERATION_AT, &3u64.to_le_bytes());
        host.write(at, bytes);
        host.write(GENERATION_AT, &4u64.to_le_bytes());
        assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Gone), "{at} {value:#x}");
        host.wait_for_seen(SEEN_ALL);
        assert_eq!(host.complaint(), COMPLAINT_INVALID);
    }
}
