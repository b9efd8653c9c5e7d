// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Error numbers of hypercalls and KVMI (`KVM_Exxx` of `<linux/kvm_para.h>`), and the errno that a
//! tool gets for each.

/// An error of a hypercall or of a KVMI command; the wire carries the negative of
/// [`KvmError::number`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmError {
    /// Not allowed here.
    Perm,
    /// Token unknown, used or expired; nothing mapped at this address.
    NoEnt,
    /// Too large.
    TooBig,
    /// Come again later.
    Again,
    /// Out of memory or of mappings.
    NoMem,
    /// An address leads nowhere.
    Fault,
    /// In use.
    Busy,
    /// An argument is out of its range.
    Inval,
    /// Not offered by this host.
    OpNotSupp,
    /// Unknown number.
    NoSys,
}

impl KvmError {
    /// Every error, in the order of its number.
    pub const ALL: [Self; 10] = [
        Self::Perm,
        Self::NoEnt,
        Self::TooBig,
        Self::Again,
        Self::NoMem,
        Self::Fault,
        Self::Busy,
        Self::Inval,
        Self::OpNotSupp,
        Self::NoSys,
    ];

    /// The positive number, `KVM_Exxx`.
    pub const fn number(self) -> i32 {
        match self {
            Self::Perm => 1,
            Self::NoEnt => 2,
            Self::TooBig => 7,
            Self::Again => 11,
            Self::NoMem => 12,
            Self::Fault => 14,
            Self::Busy => 16,
            Self::Inval => 22,
            Self::OpNotSupp => 95,
            Self::NoSys => 1000,
        }
    }

    /// The error behind a hypercall's result, `None` where the number is not one of KVM's.
    pub fn from_result(result: i64) -> Option<Self> {
        let number = result.checked_neg()?;
        Self::ALL.into_iter().find(|error| i64::from(error.number()) == number)
    }

    /// The errno that the tool gets, one of the closed set of the ioctls: KVM's number where that
    /// is in the set, EINVAL (22) for [`KvmError::TooBig`], EALREADY (114) for
    /// [`KvmError::Busy`] and EOPNOTSUPP (95) for [`KvmError::NoSys`].
    pub const fn errno(self) -> i32 {
        match self {
            Self::TooBig => 22,
            Self::Busy => 114,
            Self::NoSys => 95,
            other => other.number(),
        }
    }
}
