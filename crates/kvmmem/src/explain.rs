// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Texts for the error numbers of KVMI and of the device, for a tool that reads another VM's
//! memory.

use crate::host::ClientError;
use kvmmem_proto::message::Refusal;

use kvmmem_abi::errno::KvmError;
use rustix::io::Errno;

/// What a command's error means, and what to do about it.
pub(crate) fn kvmi(error: KvmError) -> &'static str {
    match error {
        KvmError::Perm => "EPERM: the host does not allow it to this tool",
        KvmError::NoEnt => "ENOENT: there is no such thing in the target",
        KvmError::TooBig => "E2BIG: the request is too large",
        KvmError::Again => {
            "EAGAIN: too much is outstanding; use or let expire what you have, then ask again"
        }
        KvmError::NoMem => "ENOMEM: the host is out of memory",
        KvmError::Fault => "EFAULT: an address leads nowhere",
        KvmError::Busy => "EBUSY: in use; ask again",
        KvmError::Inval => "EINVAL: the target has no memory there, or an argument is out of range",
        KvmError::OpNotSupp => "EOPNOTSUPP: the host does not offer this command",
        KvmError::NoSys => "ENOSYS: the host does not know this command",
    }
}

/// What an errno of MAP means, and what to do about it.
pub(crate) fn map(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => "ENOENT: the token is unknown, used, expired or revoked; ask for a new one",
        Errno::AGAIN => "EAGAIN: the host is busy; ask for a new token and try again",
        Errno::BUSY => "EBUSY: in use; ask for a new token and try again",
        Errno::ALREADY => "EALREADY: this page of the process is mapped already; unmap it first",
        Errno::INVAL => {
            "EINVAL: another process opened the device, or an address is unaligned or of unsuitable memory"
        }
        Errno::FAULT => "EFAULT: the target has no memory at this gpa",
        Errno::NOMEM => {
            "ENOMEM: out of memory, above RLIMIT_MEMLOCK (ulimit -l), or too many pages in this file"
        }
        Errno::PERM => "EPERM: the host does not allow it to this VM",
        Errno::OPNOTSUPP => {
            "EOPNOTSUPP: this host does not offer mapping (run kvmmem doctor), or the target's RAM is private to its VMM or in huge pages"
        }
        Errno::NOTTY => "ENOTTY: this is not the kvmmem device",
        Errno::IO => {
            "EIO: the host's answer is none of KVM's; do the module and the host fit together?"
        }
        _ => "unexpected",
    }
}

/// What an errno of UNMAP means.
pub(crate) fn unmap(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => "ENOENT: nothing is mapped there",
        Errno::INVAL => "EINVAL: another process (perhaps before fork) opened the device",
        Errno::ALREADY => "EALREADY: another thread undoes it at this moment",
        Errno::IO => "EIO: the host refused; the page stays out of use",
        Errno::NOTTY => "ENOTTY: this is not the kvmmem device",
        _ => "unexpected",
    }
}

/// What to do when the device cannot be opened.
pub(crate) fn open(error: &std::io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
            ": is the module loaded (modprobe kvmmem), and does this VM's host offer mapping? See kvmmem doctor"
        }
        Some(Errno::ACCESS | Errno::PERM) => {
            ": only root and members of the group kvmmem may open it"
        }
        Some(Errno::MFILE | Errno::NFILE) => ": too many open files (ulimit -n)",
        _ => "",
    }
}

/// What an errno of INFO means, and what to do about it.
pub(crate) fn info(errno: Errno) -> &'static str {
    match errno {
        Errno::NOTTY | Errno::INVAL => {
            "ENOTTY: the driver knows no views; update the module kvmmem, or map page by page (Device)"
        }
        _ => "unexpected",
    }
}

/// What an errno of ATTACH means, and what to do about it.
pub(crate) fn attach(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => {
            "ENOENT: the token is unknown, used, expired or for another holder; ask for a new one"
        }
        Errno::AGAIN => "EAGAIN: the host is busy; ask for a new token and try again",
        Errno::ALREADY => "EALREADY: in use; ask for a new token and try again",
        Errno::FAULT => "EFAULT: the grant reaches no memory of the target",
        Errno::NOMEM => "ENOMEM: out of memory, or this VM has too many views; detach some",
        Errno::PERM => "EPERM: the host does not allow it to this VM",
        Errno::OPNOTSUPP => {
            "EOPNOTSUPP: this host offers no views (run kvmmem doctor), or the target's RAM is private to its VMM"
        }
        Errno::KEYREVOKED => "EKEYREVOKED: the grant was revoked",
        Errno::STALE => "ESTALE: the target is gone",
        Errno::IO => {
            "EIO: the host's answer makes no sense; do the module and the host fit together?"
        }
        _ => "unexpected",
    }
}

/// What an errno of a view means that has no error of its own.
pub(crate) fn view(errno: Errno) -> &'static str {
    match errno {
        Errno::NOTCONN => "ENOTCONN: the view is detached",
        Errno::OPNOTSUPP => {
            "EOPNOTSUPP: the range begins or ends within huge pages of which other memory is a part; map it in parts, or copy it"
        }
        Errno::NOMEM => "ENOMEM: out of memory or of address space (vm.max_map_count, ulimit -v)",
        Errno::AGAIN => "EAGAIN: the host is changing the view; try again",
        Errno::IO => {
            "EIO: the host's answer makes no sense; do the module and the host fit together?"
        }
        Errno::MFILE | Errno::NFILE => "too many open files (ulimit -n)",
        _ => "unexpected",
    }
}

/// What to do when the broker gives no view.
pub(crate) fn host(error: &ClientError) -> &'static str {
    match error {
        ClientError::Connect { .. } => {
            ": on a host, is kvmmemd running? In an introspector, is kvmmem proxy (as root: kvmmem proxy --group GROUP)? May \
             this user open the socket (root, or its group)?"
        }
        ClientError::Refused { refusal: Refusal::Unknown, .. } => ": ask for a new token",
        _ => "",
    }
}
