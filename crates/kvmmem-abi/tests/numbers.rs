// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The numbers of the ABI against what they are made of: CPUID registers, error numbers, ioctl
//! arguments.

use kvmmem_abi::cpuid;
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::ioctl::MemMap;

#[test]
fn signature_registers_hold_the_signature_bytes() {
    let bytes: Vec<u8> = cpuid::SIGNATURE_REGISTERS
        .into_iter()
        .flat_map(|register| register.to_le_bytes())
        .collect();
    assert_eq!(bytes, cpuid::SIGNATURE);
}

#[test]
fn feature_bits_are_distinct() {
    assert_eq!(cpuid::FEATURE_VMCALL & cpuid::FEATURE_DOORBELL, 0);
    assert_eq!(cpuid::LEAF_FEATURES, cpuid::LEAF_SIGNATURE + 1);
}

#[test]
fn results_round_trip_for_every_error() {
    for error in KvmError::ALL {
        assert_eq!(KvmError::from_result(-i64::from(error.number())), Some(error));
    }
}

#[test]
fn other_results_are_no_error_of_kvm() {
    let positive = KvmError::ALL.map(|error| i64::from(error.number()));
    for result in [0, 1, -3, -5, -999, -1001, i64::MAX, i64::MIN, i64::MIN + 1, -(1 << 32) - 2] {
        assert_eq!(KvmError::from_result(result), None, "{result}");
    }
    for result in positive {
        assert_eq!(KvmError::from_result(result), None, "{result}");
    }
}

#[test]
fn errors_are_listed_once_in_the_order_of_their_numbers() {
    let numbers = KvmError::ALL.map(KvmError::number);
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}

#[test]
fn a_tool_never_sees_the_number_1000() {
    for error in KvmError::ALL {
        // EPERM, ENOENT, EAGAIN, ENOMEM, EFAULT, EINVAL, EOPNOTSUPP, EALREADY.
        let closed_set = [1, 2, 11, 12, 14, 22, 95, 114];
        assert!(closed_set.contains(&error.errno()), "{error:?} becomes {}", error.errno());
    }
    assert_eq!(KvmError::NoSys.errno(), KvmError::OpNotSupp.number());
}

#[test]
fn ioctl_argument_is_read_field_by_field() {
    let words: [u64; 6] = [0x0101, 0x0202, 0x0303, 0x0404, 0x0505_f000, 0x7fff_0606_0000];
    let mut bytes = [0u8; MemMap::SIZE];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    let map = MemMap::from_bytes(&bytes);
    assert_eq!(map.token.token, words[..4]);
    assert_eq!(MemMap::addresses(&bytes), (words[4], words[5]));
    assert_eq!(MemMap::token(&bytes)[..], bytes[..32]);
    assert_eq!((map.gpa, map.gva), (words[4], words[5]));
}
