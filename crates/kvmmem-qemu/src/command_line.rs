// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a VMM's command line says of its VM. The VMM can change it at will: it tells what to look
//! for, and nothing is taken for true because it stands there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kvmmem_proto::map::MAX_FILES;
use kvmmem_proto::name;
use uuid::Uuid;

use super::options::Options;
use super::vmm::Vmm;

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
    /// The sizes of QEMU's memory backends, bytes, by their ids.
    pub backends: BTreeMap<String, u64>,
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

impl CommandLine {
    /// Reads a command line as this VMM does.
    pub fn parse(vmm: Vmm, arguments: &[String]) -> Self {
        let mut line = Self { vmm: Some(vmm), ..Self::default() };
        let mut nodes = BTreeMap::new();
        let words = arguments.get(1..).unwrap_or_default();
        for (number, word) in words.iter().enumerate() {
            let next = words.get(number + 1).map(String::as_str).unwrap_or_default();
            let Some(key) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                continue;
            };
            let (key, value) = key.split_once('=').unwrap_or((key, next));
            match vmm {
                Vmm::Qemu if key == "numa" => node(&mut nodes, &Options::parse(next, "type")),
                Vmm::Qemu => line.qemu(key, next),
                _ => line.other(key, value),
            }
        }
        line.is_libvirts = vmm == Vmm::Qemu && words.iter().any(|word| word.contains("/libvirt/"));
        if vmm == Vmm::Qemu {
            let only = line.backends.values().next().filter(|_| line.backends.len() == 1);
            let default = only.copied().unwrap_or(QEMU_DEFAULT_RAM);
            line.memory = line.memory.or(Some(default));
            line.nodes = std::mem::take(&mut nodes).into_values().collect();
            line.vcpus = line.vcpus.or(Some(1));
            line.qmp = line.qmp.take().filter(|path| !path.as_os_str().is_empty());
        }
        line
    }

    /// The sizes of the backends of RAM, in the order of its addresses; `None` where they do not
    /// make up the RAM.
    pub fn sizes(&self) -> Option<Vec<u64>> {
        let all = self.memory.unwrap_or(0);
        if self.nodes.is_empty() {
            return Some(vec![all]);
        }
        let size = |id| self.backends.get(id).copied();
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
            let id = options.get("id").map(str::to_owned);
            self.backends.extend(id.zip(options.size("size", 1)));
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

/// Records the memory backend of a NUMA node: all nodes have one, or none has. A node without a
/// number is counted.
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
mod tests;
