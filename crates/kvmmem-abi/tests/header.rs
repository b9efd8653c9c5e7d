// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares `include/uapi/kvmmem.h` with the Rust side: every size, offset, ioctl number and
//! define.
//!
//! A generated C program prints what the C compiler makes of the header; each value it prints has
//! one expected value here, and each `#define` and structure of the header must be among them, so
//! that nothing can be added to one side alone. Without a C compiler the comparison is skipped, and
//! says so.

use std::collections::BTreeMap;
use std::io::Write;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use kvmmem_abi::descriptor::{self, Descriptor, WindowRange};
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{AttachRequest, AttachResult};
use kvmmem_abi::ioctl::{MapMemToken, MemMap};
use kvmmem_abi::native::{Attach, Info, Range, Ranges, Stats};
use kvmmem_abi::region::Region;
use kvmmem_abi::{cpuid, hypercall, ioctl, native, region, token_list};

/// The header's include guard: the one define without a meaning.
const GUARD: &str = "_UAPI_KVMMEM_H";

fn include_dir() -> String {
    format!("{}/include/uapi", env!("CARGO_MANIFEST_DIR"))
}

/// The offset and size of each field, the size and alignment of each structure that has the same in
/// C and Rust.
macro_rules! structures {
    ($($c:literal = $rust:ty { $($field:ident),* })*) => {
        [$(
            (concat!("sizeof(struct ", $c, ")"), size_of::<$rust>() as u64),
            (concat!("_Alignof(struct ", $c, ")"), align_of::<$rust>() as u64),
            $(
                (concat!("offsetof(struct ", $c, ", ", stringify!($field), ")"), offset_of!($rust, $field) as u64),
                (concat!("sizeof(((struct ", $c, " *)0)->", stringify!($field), ")"), field_size!($rust, $field)),
            )*
        )*]
    };
}

macro_rules! field_size {
    ($rust:ty, $field:ident) => {{
        fn size_of_what<T>(_: impl Fn(&$rust) -> &T) -> u64 {
            size_of::<T>() as u64
        }
        size_of_what(|value| &value.$field)
    }};
}

/// C expression to expected value; a define's expression is its name.
fn expected() -> BTreeMap<&'static str, u64> {
    let mut expected = numbers();
    expected.extend(structures! {
        "kvmi_map_mem_token" = MapMemToken { token }
        "kvmi_mem_map" = MemMap { token, gpa, gva }
        "kvm_guest_mem_map" = Region { token, gpa, length }
        "kvmmem_info" = Info { version, features, max_ranges, event_ms, reserved }
        "kvmmem_attach" = Attach { token, flags, reserved }
        "kvmmem_range" = Range { gpa, len }
        "kvmmem_ranges" = Ranges { generation, state, rights, uuid, capacity, count, ranges }
        "kvmmem_stats" = Stats {
            faults_4k, faults_2m, faults_1g, faults_refused, read_bytes, written_bytes, events, instance
        }
        "kvmmem_attach_request" = AttachRequest { token, pid, uid, comm, flags, reserved }
        "kvmmem_attach_result" = AttachResult { descriptor_gpa, window_gpa, window_len, reserved }
    });
    expected.extend(descriptor_fields());
    expected
}

/// The descriptor page is no structure in Rust: its fields are found in a page that
/// [`Descriptor::write`] wrote, each with a value of its own.
fn descriptor_fields() -> Vec<(&'static str, u64)> {
    let range = WindowRange { gpa: 0x1111, len: 0x2222, offset: 0x3333, window: 0x4444 };
    let written = Descriptor {
        generation: 0x5555,
        state: 0x6666,
        rights: 0x7777,
        token_digest: [0x88; 32],
        uuid: [0x99; 16],
        window_gpa: 0xaaaa,
        window_len: 0xbbbb,
        range_count: 0,
        flags: 0xdddd,
        instance: 0xcccc,
    };
    let mut page = [0; descriptor::SIZE];
    written.write(&[range; 5], &mut page);
    let at =
        |bytes: &[u8]| page.windows(bytes.len()).position(|found| found == bytes).unwrap() as u64;
    let first = at(&0x1111u64.to_le_bytes());
    vec![
        ("sizeof(struct kvmmem_descriptor)", descriptor::SIZE as u64),
        (
            "sizeof(struct kvmmem_window_range)",
            u64::from(u32::from_le_bytes(page[12..16].try_into().unwrap())),
        ),
        ("offsetof(struct kvmmem_descriptor, magic)", at(&descriptor::MAGIC.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, version)", 8),
        ("offsetof(struct kvmmem_descriptor, range_size)", 12),
        ("offsetof(struct kvmmem_descriptor, generation)", descriptor::GENERATION_AT as u64),
        ("offsetof(struct kvmmem_descriptor, state)", at(&0x6666u32.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, rights)", at(&0x7777u32.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, token_digest)", at(&[0x88; 32])),
        ("offsetof(struct kvmmem_descriptor, uuid)", at(&[0x99; 16])),
        ("offsetof(struct kvmmem_descriptor, window_gpa)", at(&0xaaaau64.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, window_len)", at(&0xbbbbu64.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, range_count)", at(&5u32.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, flags)", at(&0xddddu32.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, seen_generation)", descriptor::SEEN_AT as u64),
        ("offsetof(struct kvmmem_descriptor, slot)", descriptor::SLOT_AT as u64),
        ("offsetof(struct kvmmem_descriptor, complaint)", descriptor::COMPLAINT_AT as u64),
        ("offsetof(struct kvmmem_descriptor, instance)", at(&0xccccu64.to_le_bytes())),
        ("offsetof(struct kvmmem_descriptor, ranges)", first),
        ("sizeof(struct kvmmem_token_list)", (token_list::END - descriptor::SIZE) as u64),
        (
            "offsetof(struct kvmmem_token_list, digests)",
            (token_list::DIGESTS_AT - descriptor::SIZE) as u64,
        ),
        (
            "offsetof(struct kvmmem_token_list, used)",
            (token_list::USED_AT - descriptor::SIZE) as u64,
        ),
        ("offsetof(struct kvmmem_window_range, gpa)", 0),
        ("offsetof(struct kvmmem_window_range, len)", at(&0x2222u64.to_le_bytes()) - first),
        ("offsetof(struct kvmmem_window_range, offset)", at(&0x3333u64.to_le_bytes()) - first),
        ("offsetof(struct kvmmem_window_range, window)", at(&0x4444u32.to_le_bytes()) - first),
    ]
}

/// The defines, and the kernel's own error numbers.
fn numbers() -> BTreeMap<&'static str, u64> {
    let kvm = |error: KvmError| u64::try_from(error.number()).unwrap();
    BTreeMap::from([
        ("KVM_INTRO_MEM_MAP", u64::from(ioctl::MEM_MAP)),
        ("KVM_INTRO_MEM_UNMAP", u64::from(ioctl::MEM_UNMAP)),
        ("KVM_GUEST_MEM_OPEN", u64::from(region::MEM_OPEN)),
        ("KVM_GUEST_MEM_MAP", u64::from(region::MEM_MAP)),
        ("KVM_GUEST_MEM_UNMAP", u64::from(region::MEM_UNMAP)),
        ("KVMMEM_INFO", u64::from(native::INFO)),
        ("KVMMEM_ATTACH", u64::from(native::ATTACH)),
        ("KVMMEM_RANGES", u64::from(native::RANGES)),
        ("KVMMEM_DETACH", u64::from(native::DETACH)),
        ("KVMMEM_STATS", u64::from(native::STATS)),
        ("KVMMEM_VERSION", u64::from(native::VERSION)),
        ("KVMMEM_FEAT_VIEWS", u64::from(native::FEATURE_VIEWS)),
        ("KVMMEM_FEAT_HUGE_2M", u64::from(native::FEATURE_HUGE_2M)),
        ("KVMMEM_FEAT_HUGE_1G", u64::from(native::FEATURE_HUGE_1G)),
        ("KVMMEM_FEAT_SEEK", u64::from(native::FEATURE_SEEK)),
        ("KVMMEM_FEAT_REGIONS", u64::from(native::FEATURE_REGIONS)),
        ("KVMMEM_FEAT_DEVICES", u64::from(native::FEATURE_DEVICES)),
        ("KVMMEM_ATTACH_READ_ONLY", u64::from(native::ATTACH_READ_ONLY)),
        ("KVMMEM_STATE_OPEN", u64::from(native::STATE_OPEN)),
        ("KVMMEM_STATE_REVOKED", u64::from(native::STATE_REVOKED)),
        ("KVMMEM_STATE_GONE", u64::from(native::STATE_GONE)),
        ("KVMMEM_RIGHT_READ", u64::from(native::RIGHT_READ)),
        ("KVMMEM_RIGHT_WRITE", u64::from(native::RIGHT_WRITE)),
        ("KVMMEM_DESCRIPTOR_MAGIC", descriptor::MAGIC),
        ("KVMMEM_DESCRIPTOR_VERSION", u64::from(descriptor::VERSION)),
        ("KVMMEM_SLOT_WINDOWS", u64::from(descriptor::SLOT_WINDOWS)),
        ("KVMMEM_SEEN_ALL", descriptor::SEEN_ALL),
        ("KVMMEM_FLAG_TOKENS", u64::from(descriptor::FLAG_TOKENS)),
        ("KVMMEM_MAX_TOKENS", token_list::MAX_TOKENS as u64),
        ("KVMMEM_DIGEST_SIZE", token_list::DIGEST_SIZE as u64),
        ("KVMMEM_COMPLAINT_NO_ADDRESS", u64::from(descriptor::COMPLAINT_NO_ADDRESS)),
        ("KVMMEM_COMPLAINT_NOT_CACHED", u64::from(descriptor::COMPLAINT_NOT_CACHED)),
        ("KVMMEM_COMPLAINT_INVALID", u64::from(descriptor::COMPLAINT_INVALID)),
        ("KVMMEM_MAX_RANGES", descriptor::MAX_RANGES as u64),
        ("KVM_HC_VIEW_ATTACH", hypercall::ATTACH),
        ("KVM_HC_VIEW_DETACH", hypercall::DETACH),
        ("KVM_HC_VIEW_SEEK", hypercall::SEEK),
        ("KVM_HC_MEM_UNMAP_ALL", hypercall::UNMAP_ALL),
        ("KVMMEM_UNMAP_ALL_ZERO", hypercall::UNMAP_ALL_ZERO),
        ("KVMMEM_UNMAP_ALL_KEEP", hypercall::UNMAP_ALL_KEEP),
        ("KVMMEM_SEEK_DATA", hypercall::SEEK_DATA),
        ("KVMMEM_SEEK_HOLE", hypercall::SEEK_HOLE),
        ("KVM_HC_MEM_MAP", hypercall::MEM_MAP),
        ("KVM_HC_MEM_UNMAP", hypercall::MEM_UNMAP),
        ("KVMMEM_CPUID_SIGNATURE", u64::from(cpuid::LEAF_SIGNATURE)),
        ("KVMMEM_CPUID_FEATURES", u64::from(cpuid::LEAF_FEATURES)),
        ("KVMMEM_FEATURE_VMCALL", u64::from(cpuid::FEATURE_VMCALL)),
        ("KVMMEM_FEATURE_DOORBELL", u64::from(cpuid::FEATURE_DOORBELL)),
        ("KVMMEM_FEATURE_WINDOW", u64::from(cpuid::FEATURE_WINDOW)),
        ("KVMMEM_FEATURE_INTERRUPT", u64::from(cpuid::FEATURE_INTERRUPT)),
        // The error numbers are the kernel's own.
        ("KVM_EPERM", kvm(KvmError::Perm)),
        ("KVM_E2BIG", kvm(KvmError::TooBig)),
        ("KVM_EFAULT", kvm(KvmError::Fault)),
        ("KVM_EINVAL", kvm(KvmError::Inval)),
        ("KVM_EOPNOTSUPP", kvm(KvmError::OpNotSupp)),
        ("KVM_ENOSYS", kvm(KvmError::NoSys)),
        ("ENOENT", kvm(KvmError::NoEnt)),
        ("EAGAIN", kvm(KvmError::Again)),
        ("ENOMEM", kvm(KvmError::NoMem)),
        ("EBUSY", kvm(KvmError::Busy)),
        ("EOPNOTSUPP", u64::try_from(KvmError::NoSys.errno()).unwrap()),
    ])
}

/// Defines whose value is a string.
fn expected_strings() -> BTreeMap<&'static str, String> {
    BTreeMap::from([("KVMMEM_SIGNATURE", String::from_utf8(cpuid::SIGNATURE.to_vec()).unwrap())])
}

/// A C program that prints one `expression<TAB>value` per line.
fn program() -> String {
    let mut text = String::from(
        "#include <errno.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm_para.h>\n\
         #include \"kvmmem.h\"\nint main(void)\n{\n",
    );
    for expression in expected().keys() {
        text +=
            &format!("\tprintf(\"{expression}\\t%llu\\n\", (unsigned long long)({expression}));\n");
    }
    for name in expected_strings().keys() {
        text += &format!("\tprintf(\"{name}\\t%s\\n\", {name});\n");
    }
    text + "\treturn 0;\n}\n"
}

fn has_c_compiler() -> bool {
    Command::new("cc").arg("--version").output().is_ok_and(|output| output.status.success())
}

#[test]
fn c_and_rust_agree() {
    if !has_c_compiler() {
        // Past the test harness, which would keep it to itself.
        writeln!(
            std::io::stderr(),
            "skipped: no C compiler `cc`: install one (Debian: gcc and linux-libc-dev)"
        )
        .unwrap();
        return;
    }
    let dir = std::env::temp_dir().join(format!("kvmmem-header-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (source, binary) = (dir.join("header.c"), dir.join("header"));
    std::fs::write(&source, program()).unwrap();
    compile(&source, &binary);
    let output = Command::new(&binary).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(output.status.success());

    let text = String::from_utf8(output.stdout).unwrap();
    let printed: BTreeMap<&str, &str> =
        text.lines().map(|line| line.split_once('\t').unwrap()).collect();
    let mut wanted: BTreeMap<&str, String> =
        expected().into_iter().map(|(name, value)| (name, value.to_string())).collect();
    wanted.extend(expected_strings());
    for (name, value) in &wanted {
        assert_eq!(
            printed.get(name),
            Some(&value.as_str()),
            "{name}: C (left) against Rust (right)"
        );
    }
    assert_eq!(printed.len(), wanted.len());
}

fn compile(source: &Path, binary: &Path) {
    let output = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I", &include_dir(), "-o"])
        .args([binary, source])
        .output()
        .unwrap();
    assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_define_and_struct_of_the_header_is_compared() {
    let header = std::fs::read_to_string(format!("{}/kvmmem.h", include_dir())).unwrap();
    let (numbers, strings) = (expected(), expected_strings());
    let mut seen = 0;
    for line in header.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("#define"), Some(name), _) if name != GUARD => {
                assert!(
                    numbers.contains_key(name) || strings.contains_key(name),
                    "{name} is not compared"
                );
                seen += 1;
            }
            (Some("struct"), Some(name), Some("{")) => {
                let size = format!("sizeof(struct {name})");
                assert!(numbers.contains_key(size.as_str()), "struct {name} is not compared");
                seen += 1;
            }
            _ => {}
        }
    }
    assert!(seen >= 50, "only {seen} definitions found: is the header still read correctly?");
}
