// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The numbers of the ABI against what they are made of: CPUID registers, error numbers, ioctl
//! arguments.

use kvmmem_abi::cpuid;
use kvmmem_abi::errno::KvmError;

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
