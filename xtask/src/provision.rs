// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The programs that the test bed needs on this machine.

use std::fs;

use anyhow::{Result, bail};

use crate::cache::Cache;
use crate::tool::{Tool, is_installed, is_root};
use crate::ui;

/// A program that must be there, or a file if it begins with `/`.
struct Need {
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

/// For the module's build.
const BUILD: [Need; 2] = [
    Need {
        program: "mmdebstrap",
        package: "mmdebstrap",
        why: "makes the Debian root that the module is built in",
    },
    Need {
        program: "/usr/share/keyrings/debian-archive-keyring.gpg",
        package: "debian-archive-keyring",
        why: "checks that Debian's packages are Debian's",
    },
];

/// For running what was built.
const BED: [Need; 3] = [
    Need {
        program: crate::nested::QEMU,
        package: "qemu-system-x86",
        why: "runs the module's selftest, and emulates the KVM host where there is no hardware virtualisation",
    },
    Need { program: "cpio", package: "cpio", why: "packs the selftest's initial RAM disk" },
    Need {
        program: crate::qemus::MKE2FS,
        package: "e2fsprogs",
        why: "makes the disk with the stock QEMUs of an emulated host",
    },
];

/// For packages.
const PACKAGES: [Need; 2] = [
    Need { program: "dpkg-deb", package: "dpkg", why: "makes packages" },
    Need { program: "make", package: "make", why: "lays the module's sources out for DKMS" },
];

/// What the machine is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Make packages.
    Packages,
    /// Build the module.
    Build,
    /// Build it and run it.
    TestBed,
}

/// Installs what is missing, by apt where that is the system's way.
pub(crate) fn provision(cache: &Cache, purpose: Purpose) -> Result<()> {
    let (first, second) = match purpose {
        Purpose::Packages => (PACKAGES.as_slice(), [].as_slice()),
        Purpose::Build => (BUILD.as_slice(), [].as_slice()),
        Purpose::TestBed => (BUILD.as_slice(), BED.as_slice()),
    };
    let missing: Vec<_> = first.iter().chain(second).filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|need| need.package).collect();
    let list = packages.join(" ");
    if !uses_apt() {
        bail!(
            "this machine lacks some programs; install what Debian's packages of these names hold: {list}"
        );
    }
    if !is_root() && !is_installed("sudo") {
        bail!("this machine lacks some programs; run as root: apt-get install {list}");
    }
    ui::say("Installing from this machine's distribution:");
    for need in &missing {
        ui::say(&format!("  {}: {}", need.package, need.why));
    }
    let log = cache.fresh_log("provision")?;
    let apt = || {
        Tool::as_root("env", &log).args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"])
    };
    ui::step(&format!("apt-get install {list}"), || {
        apt().arg("update").run()?;
        apt().args(["install", "--no-install-recommends"]).args(&packages).run()
    })
}

impl Need {
    fn is_met(&self) -> bool {
        if self.program.starts_with('/') {
            fs::exists(self.program).unwrap_or(false)
        } else {
            is_installed(self.program)
        }
    }
}

/// Whether this is Debian, Ubuntu or one of their children.
fn uses_apt() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let of_debian = release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .any(|value| value.trim_matches('"').split(' ').any(|id| id == "debian" || id == "ubuntu"));
    of_debian && is_installed("apt-get")
}
