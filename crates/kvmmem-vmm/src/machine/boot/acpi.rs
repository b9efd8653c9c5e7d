// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ACPI tables of a hardware-reduced machine (ACPI specification 6.5, chapters 4.1, 5.2, 7.4):
//! RSDP, XSDT, FADT with sleep and reset registers, MADT, and a DSDT with the serial port and the
//! virtio-mmio devices.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{ACPI_TABLES, RESET_VECTOR};
use crate::machine::devices::{IOAPIC_ADDRESS, LAPIC_ADDRESS, SERIAL_GSI, SERIAL_PORT, power};

const OEM: [u8; 6] = *b"KVMMEM";
const OEM_TABLE: [u8; 8] = *b"KVMMEMVM";
const OEM_REVISION: u32 = 1;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They do not fit their area.
    #[error("the ACPI tables take {bytes:#x} bytes, more than their area has")]
    TooLarge {
        /// Their size.
        bytes: usize,
    },
    /// RAM ends before them.
    #[error("cannot write the ACPI tables to RAM")]
    Write(#[source] GuestMemoryError),
}

/// A device of the machine, as the DSDT describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AcpiDevice {
    /// The first serial port.
    Serial,
    /// A virtio device behind its register window (`LNRO0005`).
    VirtioMmio {
        /// Start of the registers.
        base: u32,
        /// Length of the registers in bytes.
        length: u32,
        /// Its interrupt, edge-triggered.
        gsi: u32,
    },
}

/// Writes the tables for `vcpus` CPUs and `devices`, and returns the GPA of the RSDP.
pub(crate) fn write_tables(
    vcpus: u8,
    devices: &[AcpiDevice],
    memory: &GuestMemoryMmap,
) -> Result<u64, AcpiError> {
    let mut tables = Tables { base: ACPI_TABLES.0, bytes: Vec::new() };
    // The RSDP stands first and points at tables whose places are known only later.
    tables.bytes.resize(Rsdp::len().next_multiple_of(TABLE_ALIGNMENT), 0);

    let dsdt = tables.add(&dsdt(devices));
    let fadt = tables.add(&fadt(dsdt));
    let madt = tables.add(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    for (slot, byte) in tables.bytes.iter_mut().zip(rsdp) {
        *slot = byte;
    }
    if ACPI_TABLES.0 + tables.bytes.len() as u64 > RESET_VECTOR {
        return Err(AcpiError::TooLarge { bytes: tables.bytes.len() });
    }
    memory.write_slice(&tables.bytes, GuestAddress(tables.base)).map_err(AcpiError::Write)?;
    Ok(tables.base)
}

const TABLE_ALIGNMENT: usize = 16;

/// Tables one behind the other.
struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its GPA.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let offset = self.bytes.len().next_multiple_of(TABLE_ALIGNMENT);
        self.bytes.resize(offset, 0);
        table.to_aml_bytes(&mut self.bytes);
        self.base + offset as u64
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    /// No VGA, no CMOS clock; and neither the 8042 nor legacy devices, by what is left out.
    const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
    let port = |address| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LAPIC_ADDRESS));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

fn dsdt(devices: &[AcpiDevice]) -> impl Aml {
    const HEADER_BYTES: u32 = 36;
    const REVISION: u8 = 2;
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut aml = Vec::new();
    // Sleep types for the sleep control register: S5, soft off, is all there is.
    let soft_off = Package::new(vec![&power::SLEEP_TYPE_S5, &power::SLEEP_TYPE_S5]);
    Name::new(Path::new("_S5_"), &soft_off).to_aml_bytes(&mut aml);
    for (index, device) in (0u8..).zip(devices) {
        append_device(index, *device, &mut aml);
    }
    dsdt.append_slice(&aml);
    dsdt
}

fn append_device(index: u8, device: AcpiDevice, aml: &mut dyn AmlSink) {
    // A consumer's interrupt, edge-triggered, active high, not shared.
    let interrupt = |gsi| Interrupt::new(true, true, false, false, gsi);
    let in_system = |device: Device<'_>, aml: &mut dyn AmlSink| {
        Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
    };
    match device {
        AcpiDevice::Serial => {
            let port = IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8);
            let gsi = interrupt(SERIAL_GSI);
            let resources = ResourceTemplate::new(vec![&gsi, &port]);
            let id = EISAName::new("PNP0501");
            let hid = Name::new(Path::new("_HID"), &id);
            let uid = Name::new(Path::new("_UID"), &index);
            let crs = Name::new(Path::new("_CRS"), &resources);
            in_system(Device::new(Path::new("COM1"), vec![&hid, &uid, &crs]), aml);
        }
        AcpiDevice::VirtioMmio { base, length, gsi } => {
            let window = Memory32Fixed::new(true, base, length);
            let gsi = interrupt(gsi);
            let resources = ResourceTemplate::new(vec![&window, &gsi]);
            let name = format!("VR{index:02X}");
            let hid = Name::new(Path::new("_HID"), &"LNRO0005");
            let uid = Name::new(Path::new("_UID"), &index);
            let cca = Name::new(Path::new("_CCA"), &ONE);
            let crs = Name::new(Path::new("_CRS"), &resources);
            in_system(Device::new(Path::new(&name), vec![&hid, &uid, &cca, &crs]), aml);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn pointer(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_tables_lead_to_each_other_and_add_up() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let devices = [
            AcpiDevice::Serial,
            AcpiDevice::VirtioMmio { base: 0xd000_0000, length: 0x1000, gsi: 16 },
        ];
        let rsdp_at = write_tables(3, &devices, &memory).unwrap();
        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, GuestAddress(rsdp_at)).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");

        let xsdt = table(&memory, pointer(&rsdp, 24));
        let fadt = table(&memory, pointer(&xsdt, 36));
        let madt = table(&memory, pointer(&xsdt, 44));
        let dsdt = table(&memory, pointer(&fadt, 140));
        for (table, signature) in
            [(&xsdt, b"XSDT"), (&fadt, b"FACP"), (&madt, b"APIC"), (&dsdt, b"DSDT")]
        {
            assert_eq!(&table[..4], signature);
            assert_eq!(
                table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
                0,
                "{signature:?}"
            );
        }
        // Three LAPICs of 8 bytes and an I/O APIC of 12 behind a header of 44.
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert!(dsdt.windows(8).any(|window| window == b"LNRO0005"));
        // Sleep control and status registers, the last generic addresses but the vendor's id.
        assert_eq!(pointer(&fadt, 244 + 4), u64::from(power::SLEEP_CONTROL_PORT));
        assert_eq!(pointer(&fadt, 256 + 4), u64::from(power::SLEEP_STATUS_PORT));
    }

    #[test]
    fn a_machine_as_large_as_they_get_has_room() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let virtio = AcpiDevice::VirtioMmio { base: 0xd000_0000, length: 0x1000, gsi: 16 };
        assert!(write_tables(crate::config::MAX_VCPUS, &[virtio; 8], &memory).is_ok());
    }
}
