// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a VMM's command line says of its VM. The VMM can change it at will: it tells what to look
//! for, and nothing is taken for true because it stands there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kvmmem_proto::map::MAX_FILES;
use kvmmem_proto::name;
use serde::Serialize;
use uuid::Uuid;

use super::options::Options;

/// The most memory backends that are looked at.
const MAX_BACKENDS: usize = 256;

/// QEMU's own default for `-m`, bytes.
const QEMU_DEFAULT_RAM: u64 = 128 << 20;

/// QEMU's objects that make a guest confidential, and what they are called.
const CONFIDENTIAL: [(&str, &str); 5] = [
    ("sev-guest", "AMD SEV"),
    ("sev-snp-guest", "AMD SEV-SNP"),
    ("tdx-guest", "Intel TDX"),
    ("s390-pv-guest", "IBM Secure Execution"),
    ("pef-guest", "POWER PEF"),
];

/// A program that runs VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// crosvm.
    Crosvm,
    /// Firecracker.
    Firecracker,
    /// `kvmmem vm`.
    Kvmmem,
}

/// What a command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Whose it is.
    pub vmm: Option<Vmm>,
    /// Name of the VM, with control characters replaced.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: Option<Uuid>,
    /// Its vCPUs.
    pub vcpus: Option<u32>,
    /// RAM from the start, bytes.
    pub memory: Option<u64>,
    /// QEMU's machine type.
    pub machine: Option<String>,
    /// QEMU's limit of the RAM below 4 GiB, bytes.
    pub max_ram_below_4g: Option<u64>,
    /// QEMU's memory backends.
    pub backends: Vec<BackendOption>,
    /// The ids of the backends of QEMU's NUMA nodes, by the nodes' numbers.
    pub nodes: Vec<String>,
    /// Whether RAM may be plugged in later.
    pub is_growable: bool,
    /// Which technology keeps the guest's memory from the host.
    pub confidential: Option<String>,
    /// Where QMP is spoken.
    pub qmp: Option<PathBuf>,
    /// Where Cloud Hypervisor and Firecracker answer over HTTP, as the process sees it.
    pub api: Option<PathBuf>,
    /// Whether libvirt has started it.
    pub is_libvirts: bool,
}

/// Options of QEMU. Its tools (`qemu-img`, `qemu-nbd`, `qemu-storage-daemon`) and its user
/// emulators have one of them at most.
const QEMUS_OPTIONS: [&str; 17] = [
    "M",
    "accel",
    "boot",
    "cpu",
    "device",
    "display",
    "drive",
    "enable-kvm",
    "kernel",
    "machine",
    "name",
    "netdev",
    "nodefaults",
    "nographic",
    "qmp",
    "smp",
    "uuid",
];

/// Whether a command line is one that starts a VM under QEMU, by two options or more that QEMU has.
pub(crate) fn has_qemus_options(arguments: &[String]) -> bool {
    let option = |word: &String| {
        let key = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
        QEMUS_OPTIONS.iter().find(|option| **option == key).copied()
    };
    let found: std::collections::BTreeSet<&str> =
        arguments.iter().skip(1).filter_map(option).collect();
    found.len() >= 2
}

/// A memory backend of QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendOption {
    /// What other options call it.
    pub id: String,
    /// Bytes.
    pub size: u64,
}

impl Vmm {
    /// Which VMM a process is, by its program's file name and its arguments. A QEMU under another
    /// name, as a wrapper's or a patched one, is told by the name in its arguments or by its
    /// options.
    pub fn recognise(program: &str, arguments: &[String]) -> Option<Self> {
        let called = arguments.first().and_then(|word| word.rsplit('/').next()).unwrap_or_default();
        match program {
            "qemu-kvm" | "qemu-system" | "kvm" => Some(Self::Qemu),
            _ if program.contains("qemu-system-") || called.starts_with("qemu-system-") => {
                Some(Self::Qemu)
            }
            _ if program.contains("qemu") && has_qemus_options(arguments) => Some(Self::Qemu),
            _ if program.starts_with("cloud-hypervisor") => Some(Self::CloudHypervisor),
            _ if program.starts_with("firecracker") => Some(Self::Firecracker),
            "crosvm" if arguments.iter().any(|word| word == "run") => Some(Self::Crosvm),
            "kvmmem" if arguments.iter().any(|word| word == "vm") => Some(Self::Kvmmem),
            _ => None,
        }
    }

    /// How people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Crosvm => "crosvm",
            Self::Firecracker => "Firecracker",
            Self::Kvmmem => "kvmmem",
        }
    }

    /// Reads the command line as this VMM does.
    pub fn command_line(self, arguments: &[String]) -> CommandLine {
        let mut line = CommandLine { vmm: Some(self), ..CommandLine::default() };
        let mut nodes = BTreeMap::new();
        let words = arguments.get(1..).unwrap_or_default();
        for (number, word) in words.iter().enumerate() {
            let next = words.get(number + 1).map(String::as_str).unwrap_or_default();
            let Some(key) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                continue;
            };
            let (key, value) = key.split_once('=').unwrap_or((key, next));
            match self {
                Self::Qemu if key == "numa" => node(&mut nodes, &Options::parse(next, "type")),
                Self::Qemu => line.qemu(key, next),
                _ => line.other(key, value),
            }
        }
        line.is_libvirts =
            self == Self::Qemu && words.iter().any(|word| word.contains("/libvirt/"));
        if self == Self::Qemu {
            line.memory = line.memory.or(match line.backends.as_slice() {
                [one] => Some(one.size),
                _ => Some(QEMU_DEFAULT_RAM),
            });
            line.nodes = std::mem::take(&mut nodes).into_values().collect();
            line.vcpus = line.vcpus.or(Some(1));
            line.qmp = line.qmp.take().filter(|path| !path.as_os_str().is_empty());
        }
        line
    }
}

impl CommandLine {
    /// The sizes of the backends of RAM, in the order of its addresses; `None` where they do not
    /// make up the RAM.
    pub fn sizes(&self) -> Option<Vec<u64>> {
        let all = self.memory.unwrap_or(0);
        if self.nodes.is_empty() {
            return Some(vec![all]);
        }
        let size = |id: &String| {
            self.backends.iter().find(|backend| backend.id == *id).map(|backend| backend.size)
        };
        let sizes = self.nodes.iter().map(size).collect::<Option<Vec<_>>>()?;
        let sum = sizes.iter().try_fold(0u64, |sum, size| sum.checked_add(*size));
        (sum == Some(all) && sizes.len() <= MAX_FILES).then_some(sizes)
    }

    fn qemu(&mut self, key: &str, value: &str) {
        match key {
            "name" => self.name = Options::parse(value, "guest").get("guest").and_then(name::fit),
            "uuid" => self.uuid = uuid(value),
            "smbios" => {
                self.uuid = self.uuid.or_else(|| uuid(Options::parse(value, "type").get("uuid")?))
            }
            "smp" => self.vcpus = vcpus(&Options::parse(value, "cpus")),
            "m" => {
                let options = Options::parse(value, "size");
                self.memory = options.size("size", 1 << 20).or(self.memory);
                self.is_growable |= options.get("maxmem").is_some();
            }
            "machine" | "M" => self.machine(&Options::parse(value, "type")),
            "object" => self.object(&Options::parse(value, "qom-type")),
            "device" => {
                let options = Options::parse(value, "driver");
                let driver = options.get("driver").unwrap_or_default();
                self.is_growable |=
                    ["pc-dimm", "nvdimm", "virtio-mem-pci", "virtio-pmem-pci"].contains(&driver);
            }
            "qmp" | "qmp-pretty" => {
                let options = value.strip_prefix("unix:").map(|text| Options::parse(text, "path"));
                if let Some(path) = options.as_ref().and_then(|options| options.get("path")) {
                    self.qmp = Some(path.into());
                }
            }
            _ => {}
        }
    }

    fn machine(&mut self, options: &Options) {
        if let Some(machine) = options.get("type") {
            self.machine = name::fit(machine);
        }
        self.max_ram_below_4g = options.size("max-ram-below-4g", 1).or(self.max_ram_below_4g);
        if options.get("confidential-guest-support").is_some()
            || options.get("memory-encryption").is_some()
        {
            self.confidential.get_or_insert_with(|| "memory encryption".to_owned());
        }
    }

    fn object(&mut self, options: &Options) {
        let kind = options.get("qom-type").unwrap_or_default();
        if let Some((_, name)) = CONFIDENTIAL.iter().find(|(object, _)| *object == kind) {
            self.confidential = Some((*name).to_owned());
        }
        if kind.starts_with("memory-backend-") && self.backends.len() < MAX_BACKENDS {
            let of = |id: &str, size| BackendOption { id: id.to_owned(), size };
            self.backends.extend(
                options.get("id").zip(options.size("size", 1)).map(|(id, size)| of(id, size)),
            );
        }
    }

    /// Cloud Hypervisor, crosvm, Firecracker and `kvmmem vm`: options that mean the same have the
    /// same few names.
    fn other(&mut self, key: &str, value: &str) {
        match key {
            "name" | "id" => self.name = name::fit(value),
            "uuid" => self.uuid = uuid(value),
            "platform" => {
                let options = Options::parse(value, "");
                self.uuid = options.get("uuid").and_then(uuid);
                for (switch, name) in [("tdx", "Intel TDX"), ("sev_snp", "AMD SEV-SNP")] {
                    if options.is_on(switch) {
                        self.confidential = Some(name.to_owned());
                    }
                }
            }
            "cpus" => self.vcpus = Options::parse(value, "boot").number("boot"),
            "api-socket" | "api-sock" => {
                self.api = Options::parse(value, "path").get("path").map(Into::into)
            }
            "memory-zone" => self.is_growable = true,
            "memory" | "mem" | "m" => {
                let options = Options::parse(value, "size");
                self.memory = options.size("size", 1 << 20);
                self.is_growable |= options.get("hotplug_size").is_some();
            }
            _ => {}
        }
    }
}

/// Takes note of a NUMA node that has a memory backend: all have, or none. Without a number it is
/// counted.
fn node(nodes: &mut BTreeMap<u32, String>, options: &Options) {
    let Some(backend) = options.get("memdev").filter(|_| nodes.len() < MAX_BACKENDS) else {
        return;
    };
    let counted = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
    nodes.insert(options.number("nodeid").unwrap_or(counted), backend.to_owned());
}

fn uuid(text: &str) -> Option<Uuid> {
    Uuid::parse_str(text).ok().filter(|uuid| !uuid.is_nil())
}

fn vcpus(options: &Options) -> Option<u32> {
    options.number("cpus").or_else(|| {
        let counts =
            ["sockets", "dies", "cores", "threads"].map(|key| options.number(key).unwrap_or(1));
        counts.into_iter().try_fold(1u32, u32::checked_mul)
    })
}

/// A size as `-m` takes it, for messages.
pub(crate) fn in_units(bytes: u64) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1 << 30) => format!("{}G", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(vmm: Vmm, line: &str) -> CommandLine {
        let arguments: Vec<String> = line.split(' ').map(str::to_owned).collect();
        vmm.command_line(&arguments)
    }

    #[test]
    fn qemu_by_hand() {
        let line = read(
            Vmm::Qemu,
            "qemu-system-x86_64 -name guest=web,debug-threads=on -m 5G -smp sockets=2,cores=3 \
             -object memory-backend-memfd,id=mem,size=5G,share=on -machine q35,memory-backend=mem \
             -uuid 6a36c1ae-6c5f-4c4b-8a6b-8a9f7c3c1a01 -qmp unix:/run/web.sock,server=on,wait=off",
        );
        assert_eq!(line.name.as_deref(), Some("web"));
        assert_eq!((line.vcpus, line.memory), (Some(6), Some(5 << 30)));
        let backend = BackendOption { id: "mem".into(), size: 5 << 30 };
        assert_eq!(
            (line.machine.as_deref(), line.backends.as_slice()),
            (Some("q35"), &[backend][..])
        );
        assert_eq!(line.qmp, Some("/run/web.sock".into()));
        assert!(
            line.uuid.is_some()
                && line.confidential.is_none()
                && !line.is_growable
                && !line.is_libvirts
        );
    }

    #[test]
    fn qemu_by_libvirt() {
        let line = read(
            Vmm::Qemu,
            "/usr/bin/qemu-system-x86_64 -name guest=db,debug-threads=on -S -object \
             {\"qom-type\":\"secret\",\"id\":\"masterKey0\",\"format\":\"raw\",\"file\":\"/var/lib/libvirt/qemu/x\"} \
             -machine pc-q35-9.2,usb=off,memory-backend=pc.ram,max-ram-below-4g=1G -m size=4194304k,slots=4,maxmem=8388608k \
             -object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"pc.ram\",\"share\":true,\"size\":4294967296} \
             -smp 2,sockets=2,cores=1,threads=1 -object {\"qom-type\":\"sev-snp-guest\",\"id\":\"lsec0\"} \
             -device {\"driver\":\"pc-dimm\",\"memdev\":\"memdimm0\"}",
        );
        assert_eq!(line.name.as_deref(), Some("db"));
        assert_eq!(
            (line.vcpus, line.memory, line.max_ram_below_4g),
            (Some(2), Some(4 << 30), Some(1 << 30))
        );
        assert_eq!(
            (line.machine.as_deref(), line.confidential.as_deref()),
            (Some("pc-q35-9.2"), Some("AMD SEV-SNP"))
        );
        assert_eq!(line.backends, [BackendOption { id: "pc.ram".into(), size: 4 << 30 }]);
        assert!(line.is_growable && line.is_libvirts);
    }

    #[test]
    fn memory_without_a_size_is_that_of_the_one_backend() {
        let line = read(Vmm::Qemu, "qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G");
        assert_eq!(line.memory, Some(1 << 30));
        assert_eq!(read(Vmm::Qemu, "qemu-system-x86_64").memory, Some(128 << 20));
    }

    #[test]
    fn nodes_are_in_the_order_of_their_numbers() {
        let line = read(
            Vmm::Qemu,
            "qemu-system-x86_64 -numa node,nodeid=1,cpus=1,memdev=b -numa node,nodeid=0,memdev=a -numa node,cpus=2 \
             -numa node,memdev=c -numa dist,src=0,dst=1,val=20",
        );
        assert_eq!(line.nodes, ["a", "b", "c"]);
    }

    #[test]
    fn others() {
        let line = read(
            Vmm::CloudHypervisor,
            "cloud-hypervisor --memory size=1G,shared=on --cpus boot=4 --platform sev_snp=on",
        );
        assert_eq!(
            (line.memory, line.vcpus, line.confidential.as_deref()),
            (Some(1 << 30), Some(4), Some("AMD SEV-SNP"))
        );
        let line = read(Vmm::Crosvm, "crosvm run --mem 512 --cpus 2 --name x\u{1b}y");
        assert_eq!(
            (line.memory, line.vcpus, line.name.as_deref()),
            (Some(512 << 20), Some(2), Some("x?y"))
        );
        let line = read(Vmm::Firecracker, "firecracker --id=abc --api-sock /run/x");
        assert_eq!((line.name.as_deref(), line.api), (Some("abc"), Some("/run/x".into())));
        let line = read(
            Vmm::CloudHypervisor,
            "cloud-hypervisor --api-socket path=/run/y --memory-zone id=a,size=1G",
        );
        assert!(line.api == Some("/run/y".into()) && line.is_growable);
    }

    #[test]
    fn programs_are_recognised_by_name() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(Vmm::recognise("qemu-system-aarch64", &[]), Some(Vmm::Qemu));
        assert_eq!(Vmm::recognise("firecracker-v1.9.0", &[]), Some(Vmm::Firecracker));
        assert_eq!(Vmm::recognise("kvmmem", &words("kvmmem --json vm")), Some(Vmm::Kvmmem));
        assert_eq!(Vmm::recognise("kvmmem", &words("kvmmem target list")), None);
        assert_eq!(Vmm::recognise("qemu-img", &[]), None);
    }

    #[test]
    fn a_qemu_is_recognised_under_another_name() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let qemu = "-name guest=web,debug-threads=on -m 32 -machine q35";
        for (program, called) in [
            (".qemu-system-x86_64-wrapped", "x"),
            ("wrapper", "/nix/store/x/bin/qemu-system-x86_64"),
            ("qemu_patched", "./qemu_patched"),
            ("my-qemu", "my-qemu"),
        ] {
            let arguments = words(&format!("{called} {qemu}"));
            assert_eq!(Vmm::recognise(program, &arguments), Some(Vmm::Qemu), "{program}");
        }
        for (program, line) in [
            ("qemu-img", "qemu-img convert -m 8 -S 4k -O qcow2 -p a b"),
            ("qemu-nbd", "qemu-nbd --connect=/dev/nbd0 --object secret,id=s --persistent x.qcow2"),
            (
                "qemu-storage-daemon",
                "qemu-storage-daemon --blockdev file --export x --chardev y --monitor z",
            ),
            ("qemu-x86_64", "qemu-x86_64 -cpu max -L /usr/arm ./program x"),
            ("vmm", &format!("vmm {qemu}")),
            ("bash", "bash -c qemu-system-x86_64"),
        ] {
            assert_eq!(Vmm::recognise(program, &words(line)), None, "{program}");
        }
    }

    proptest! {
        #[test]
        fn any_command_line_is_read_without_harm(
            words in proptest::collection::vec(
                prop_oneof![
                    ".{0,40}",
                    prop::sample::select(vec!["-m", "-numa", "-smp", "-object", "-machine", "-name", "-qmp", "-uuid", "--memory", "--cpus"])
                        .prop_map(str::to_owned),
                    "(size|share|memdev|nodeid|cpus|cores|sockets|type|guest|qom-type)=[0-9a-z,]{0,30}",
                ],
                0..20,
            )
        ) {
            for vmm in [Vmm::Qemu, Vmm::CloudHypervisor, Vmm::Crosvm, Vmm::Firecracker, Vmm::Kvmmem] {
                let line = vmm.command_line(&words);
                prop_assert!(line.name.is_none_or(|name| name::is_name(&name)));
            }
        }
    }
}
