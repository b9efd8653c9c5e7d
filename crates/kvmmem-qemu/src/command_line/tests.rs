// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Command lines of each VMM.

use super::*;
use proptest::prelude::*;

fn read(vmm: Vmm, line: &str) -> CommandLine {
    let arguments: Vec<String> = line.split(' ').map(str::to_owned).collect();
    CommandLine::parse(vmm, &arguments)
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
    assert_eq!(line.machine.as_deref(), Some("q35"));
    assert_eq!(line.backends, [("mem".to_owned(), 5 << 30)].into());
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
    assert_eq!(line.backends, [("pc.ram".to_owned(), 4 << 30)].into());
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
            let line = CommandLine::parse(vmm, &words);
            prop_assert!(line.name.is_none_or(|name| name::is_name(&name)));
        }
    }
}
