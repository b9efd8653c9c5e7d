// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares `include/uapi/kvmmem.h` with the Rust side: every size, offset, ioctl number and define.
//!
//! A generated C program prints what the C compiler makes of the header; each value it prints has one expected value
//! here, and each `#define` and structure of the header must be among them, so that nothing can be added to one side
//! alone. Without a C compiler the comparison is skipped, and says so.

use std::collections::BTreeMap;
use std::io::Write;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::ioctl::{MapMemToken, MemMap};
use kvmmem_abi::{cpuid, hypercall, ioctl};

/// The header's include guard: the one define without a meaning.
const GUARD: &str = "_UAPI_KVMMEM_H";

fn include_dir() -> String {
    format!("{}/include/uapi", env!("CARGO_MANIFEST_DIR"))
}

/// C expression to expected value; a define's expression is its name.
fn expected() -> BTreeMap<&'static str, u64> {
    let kvm = |error: KvmError| u64::try_from(error.number()).unwrap();
    BTreeMap::from([
        ("sizeof(struct kvmi_map_mem_token)", size_of::<MapMemToken>() as u64),
        ("_Alignof(struct kvmi_map_mem_token)", align_of::<MapMemToken>() as u64),
        ("offsetof(struct kvmi_map_mem_token, token)", offset_of!(MapMemToken, token) as u64),
        ("sizeof(((struct kvmi_map_mem_token *)0)->token[0])", 8),
        ("sizeof(struct kvmi_mem_map)", size_of::<MemMap>() as u64),
        ("_Alignof(struct kvmi_mem_map)", align_of::<MemMap>() as u64),
        ("offsetof(struct kvmi_mem_map, token)", offset_of!(MemMap, token) as u64),
        ("offsetof(struct kvmi_mem_map, gpa)", offset_of!(MemMap, gpa) as u64),
        ("offsetof(struct kvmi_mem_map, gva)", offset_of!(MemMap, gva) as u64),
        ("sizeof(((struct kvmi_mem_map *)0)->gpa)", 8),
        ("sizeof(((struct kvmi_mem_map *)0)->gva)", 8),
        ("KVM_INTRO_MEM_MAP", u64::from(ioctl::MEM_MAP)),
        ("KVM_INTRO_MEM_UNMAP", u64::from(ioctl::MEM_UNMAP)),
        ("KVM_HC_MEM_MAP", hypercall::MEM_MAP),
        ("KVM_HC_MEM_UNMAP", hypercall::MEM_UNMAP),
        ("KVMMEM_CPUID_SIGNATURE", u64::from(cpuid::LEAF_SIGNATURE)),
        ("KVMMEM_CPUID_FEATURES", u64::from(cpuid::LEAF_FEATURES)),
        ("KVMMEM_FEATURE_VMCALL", u64::from(cpuid::FEATURE_VMCALL)),
        ("KVMMEM_FEATURE_DOORBELL", u64::from(cpuid::FEATURE_DOORBELL)),
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
        text += &format!("\tprintf(\"{expression}\\t%llu\\n\", (unsigned long long)({expression}));\n");
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
            "SKIPPED c_and_rust_agree: no C compiler `cc`; install one (Debian: gcc and linux-libc-dev)"
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
    let printed: BTreeMap<&str, &str> = text.lines().map(|line| line.split_once('\t').unwrap()).collect();
    let mut wanted: BTreeMap<&str, String> =
        expected().into_iter().map(|(name, value)| (name, value.to_string())).collect();
    wanted.extend(expected_strings());
    for (name, value) in &wanted {
        assert_eq!(printed.get(name), Some(&value.as_str()), "{name}: C (left) against Rust (right)");
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
                assert!(numbers.contains_key(name) || strings.contains_key(name), "{name} is not compared");
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
    assert!(seen >= 11, "only {seen} definitions found: is the header still read correctly?");
}
