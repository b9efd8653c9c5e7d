// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether views can be attached in this guest, and why not.

use kvmmem::device;
use kvmmem_abi::cpuid::FEATURE_WINDOW;
use kvmmem_abi::native::{
    FEATURE_DEVICES, FEATURE_HUGE_1G, FEATURE_HUGE_2M, FEATURE_REGIONS, FEATURE_SEEK,
    FEATURE_VIEWS, Info, VERSION,
};
use kvmmem_sys::view::ViewFile;
use rustix::io::Errno;

use super::check::Check;

const NAME: &str = "views";

/// `host` are the feature bits that the host shows. Without views, pages can still be mapped one by
/// one.
pub(super) fn check(host: Option<u32>) -> Check {
    match ViewFile::open(&device::default_path()) {
        Ok(file) => judge(host, file.info()),
        Err(_) => Check::warn(NAME, "not known without the device", "see device"),
    }
}

fn judge(host: Option<u32>, info: Result<Info, Errno>) -> Check {
    let info = match info {
        Ok(info) => info,
        Err(Errno::NOTTY | Errno::INVAL) => {
            return Check::warn(
                NAME,
                "the module knows none",
                "update the module kvmmem in this guest",
            );
        }
        Err(error) => {
            return Check::warn(
                NAME,
                format!("the module does not say: {error}"),
                "see the kernel's log: dmesg",
            );
        }
    };
    let host_offers = host.is_some_and(|features| features & FEATURE_WINDOW != 0);
    if info.version != VERSION {
        let detail =
            format!("the module has version {} of them, this tool has {VERSION}", info.version);
        return Check::warn(NAME, detail, "update the older of the two");
    }
    if info.features & FEATURE_VIEWS != 0 {
        let known = [
            (FEATURE_HUGE_2M, "pages of 2 MiB"),
            (FEATURE_HUGE_1G, "pages of 1 GiB"),
            (FEATURE_SEEK, "holes are known"),
            (FEATURE_REGIONS, "libkvmi's regions"),
            (FEATURE_DEVICES, "as PCI devices, by the host's guest endpoint"),
        ];
        let has =
            known.into_iter().filter(|(bit, _)| info.features & bit != 0).map(|(_, name)| name);
        let list: Vec<&str> = std::iter::once("can be attached").chain(has).collect();
        return Check::ok(NAME, list.join(", "));
    }
    if host_offers {
        Check::warn(
            NAME,
            "the host offers them, the module makes no use of it",
            "see the kernel's log for why: dmesg | grep kvmmem",
        )
    } else {
        Check::warn(
            NAME,
            "the host offers none, only the page-by-page ioctls (v1)",
            "start this virtual machine without --no-window, on a host whose KVM has read-only memory slots",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn each_reason_has_its_own_words() {
        let info = |version, features| Ok(Info { version, features, ..Info::default() });
        let host = Some(FEATURE_WINDOW);
        let cases = [
            (host, info(VERSION, FEATURE_VIEWS | FEATURE_HUGE_2M), Status::Ok, "pages of 2 MiB"),
            // PCI devices show no signature.
            (
                None,
                info(VERSION, FEATURE_VIEWS | FEATURE_DEVICES),
                Status::Ok,
                "the host's guest endpoint",
            ),
            (host, info(VERSION + 1, FEATURE_VIEWS), Status::Warn, "version 2"),
            (host, info(VERSION, FEATURE_REGIONS), Status::Warn, "the host offers them"),
            (Some(0), info(VERSION, 0), Status::Warn, "the host offers none"),
            (host, Err(Errno::NOTTY), Status::Warn, "knows none"),
            (host, Err(Errno::IO), Status::Warn, "does not say"),
        ];
        for (host, info, status, words) in cases {
            let check = judge(host, info);
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.detail.contains(words), "{check:?}");
        }
    }
}
