// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same for libvirt, as parts of its XML.

use super::{Machine, Parts};

impl Parts<'_> {
    /// Elements to add to a domain's XML, with comments for the places.
    pub(super) fn xml(&self) -> String {
        let mut xml = vec![
            "<!-- virsh edit: the first line becomes -->".to_owned(),
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
                .to_owned(),
            "  <!-- within <devices> -->".to_owned(),
        ];
        match self.machine {
            Machine::Q35 => {
                for number in 0..self.views {
                    xml.push("  <controller type='pci' model='pcie-root-port'>".to_owned());
                    xml.push(format!("    <alias name='{}'/>", port(number)));
                    xml.push("  </controller>".to_owned());
                }
            }
            Machine::Pc => {
                let kib = self.total_reserve() >> 10;
                xml.push("  <controller type='pci' index='0' model='pci-root'>".to_owned());
                xml.push(format!("    <pcihole64 unit='KiB'>{kib}</pcihole64>"));
                xml.push("  </controller>".to_owned());
            }
        }
        xml.push("  <vsock model='virtio'>".to_owned());
        xml.push(format!("    <cid auto='no' address='{}'/>", self.cid));
        xml.push("  </vsock>".to_owned());
        xml.push("  <!-- at the end, before </domain> -->".to_owned());
        xml.push("  <qemu:commandline>".to_owned());
        xml.push("    <qemu:arg value='-qmp'/>".to_owned());
        xml.push(format!("    <qemu:arg value='unix:{},server=on,wait=off'/>", self.qmp.display()));
        xml.push("  </qemu:commandline>".to_owned());
        if self.machine == Machine::Q35 {
            xml.push("  <qemu:override>".to_owned());
            for number in 0..self.views {
                xml.push(format!("    <qemu:device alias='{}'>", port(number)));
                xml.push("      <qemu:frontend>".to_owned());
                let property = "        <qemu:property name='pref64-reserve' type='unsigned'";
                xml.push(format!("{property} value='{}'/>", self.reserve));
                xml.push("      </qemu:frontend>".to_owned());
                xml.push("    </qemu:device>".to_owned());
            }
            xml.push("  </qemu:override>".to_owned());
        }
        xml.join("\n")
    }
}

/// An alias that libvirt lets users give, and makes the device's id in QEMU.
fn port(number: u64) -> String {
    format!("ua-kvmmem{number}")
}
