// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMMs whose memory is not as they say, or lies where few have it.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use kvmmem::host::HostLink;
use kvmmem_abi::errno::KvmError;
use kvmmem_client::admin::{Evidence, GrantRequest, Rights, Which};
use kvmmem_client::vmm::RedeemError;
use kvmmem_kvmi::request::Request;
use kvmmem_qemu::discover::discover;
use serde_json::json;

use crate::common::{TestBroker, Tool, ToolSession, request, wait_for};
use crate::fake::{Fake, HONEST, SIZE, refusal};

#[test]
fn a_vmm_that_lies_shows_no_more_than_its_own_file() {
    let broker = TestBroker::start();
    let mut fake = Fake::start("sealed tables", HONEST);
    let added = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    assert_eq!(added.target.identity.name, "fake");
    assert_eq!(added.evidence, Evidence::RulesAndAcpi);
    assert_eq!(added.regions.iter().map(|region| region.len).sum::<u64>(), SIZE - 0x2_0000);
    let terms = GrantRequest { target: "fake".into(), ..request(Rights::ReadOnly) };
    let (link, view) = HostLink::attach(&broker.path, &broker.grant(&terms).token, true).unwrap();
    let mut bytes = [0; 8];
    rustix::io::pread(&view.files[0], &mut bytes, 0xe_0000).unwrap();
    assert_eq!(&bytes, b"RSD PTR ");
    fake.end();
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    drop(link);
}

#[test]
fn tools_use_an_added_target_as_any_other() {
    let broker = TestBroker::start();
    let mut fake = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("fake", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    let read =
        |session: &mut ToolSession, gpa, size| session.ask(Request::ReadPhysical { gpa, size });
    assert_eq!(read(&mut session, 0xe_0000, 8).unwrap(), b"RSD PTR ");
    assert_eq!(read(&mut session, 0xa_0000, 8), Err(KvmError::Inval));
    session.ask(Request::WritePhysical { gpa: 0x10_0000, data: b"stripes" }).unwrap();
    assert_eq!(read(&mut session, 0x10_0000, 7).unwrap(), b"stripes");
    let (introspector, _views) = broker.viewer("watcher", 4, Duration::ZERO);
    let token = session.token().unwrap();
    assert_eq!(introspector.redeem(&token).unwrap().target.name(), "fake");
    let unused = session.token().unwrap();
    fake.end();
    assert!(session.is_closed());
    wait_for("the target to go", || broker.admin().targets().unwrap().len() == 1);
    assert!(matches!(introspector.redeem(&unused), Err(RedeemError::Unknown)));
}

#[test]
fn what_is_wrong_with_the_memory_is_said() {
    let broker = TestBroker::start();
    let with = |more: &[&'static str]| [HONEST, more].concat();
    let cases: Vec<(&str, Vec<&str>, &str)> = vec![
        ("", with(&[]), "no memory of 32M that could be RAM"),
        ("private", with(&[]), "not confirmed by the guest's memory"),
        ("private private tables", with(&[]), "several mappings of 32M"),
        ("sealed sealed tables", with(&[]), "several mappings of 32M"),
        ("sealed", with(&[]), "not confirmed by the guest's memory"),
        ("sealed tables", with(&["-m", "64"]), "no memory of 64M"),
        ("sealed tables", with(&["-m", "32,maxmem=1G"]), "may have been plugged in"),
        ("sealed tables", with(&["-machine", "microvm"]), "machine type \"microvm\""),
        ("sealed tables", with(&["-object", "sev-snp-guest,id=s"]), "confidential (AMD SEV-SNP)"),
        (
            "sealed tables",
            with(&["-object", "{\"qom-type\":\"tdx-guest\"}"]),
            "confidential (Intel TDX)",
        ),
    ];
    for (spec, arguments, words) in cases {
        let fake = Fake::start(spec, &arguments);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains(words), "{spec} {arguments:?}: {message}");
    }
    assert!(broker.admin().targets().unwrap().is_empty());
}

#[test]
fn what_cannot_be_mapped_is_copied() {
    let broker = TestBroker::start();
    let libvirts = [HONEST, &["-object", "x,file=/var/lib/libvirt/k"]].concat();
    let memfd = "-object memory-backend-memfd,id=mem,size=32M,share=on -machine memory-backend=mem";
    let cases = [
        (
            "private tables",
            HONEST,
            "private: no file of 32M is mapped shared; it is copied, not mapped",
            memfd,
        ),
        ("private tables", &libvirts, "private", "<source type='memfd'/>"),
        ("unsealed tables", HONEST, "not sealed against shrinking; it is copied", memfd),
    ];
    for (spec, arguments, reason, remedy) in cases {
        let fake = Fake::start(spec, arguments);
        let added = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
        let copied = added.copied.unwrap();
        assert!(copied.contains(reason) && copied.contains(remedy), "{copied}");
        // Clients do not get its address in the VMM.
        assert!(added.regions.iter().all(|region| region.offset == region.gpa));
        let again = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(again.contains("registered already"), "{again}");
        let tool = Tool::listen(&broker, "tool.sock");
        broker.admin().hook("fake", &tool.endpoint).unwrap();
        let mut session = tool.accept();
        let read = Request::ReadPhysical { gpa: 0xe_0000, size: 8 };
        assert_eq!(session.ask(read).unwrap(), b"RSD PTR ");
        session.ask(Request::WritePhysical { gpa: 0x10_0000, data: b"stripes" }).unwrap();
        assert_eq!(
            session.ask(Request::ReadPhysical { gpa: 0x10_0000, size: 7 }).unwrap(),
            b"stripes"
        );
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(found.attachable && found.copied && found.remedy.unwrap().contains(remedy));
        drop(fake);
        assert!(session.is_closed());
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
        std::fs::remove_file(broker.directory.path().join("tool.sock")).unwrap();
    }
}

#[test]
fn a_file_that_is_truncated_does_no_harm() {
    let broker = TestBroker::start();
    let mut fake = Fake::start("unsealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("fake", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    let read = || Request::ReadPhysical { gpa: 0xe_0000, size: 8 };
    session.ask(read()).unwrap();
    fake.truncate();
    assert!(session.ask(read()).is_err());
    assert!(session.ask(Request::WritePhysical { gpa: 0xe_0000, data: b"x" }).is_err());
    assert_eq!(broker.admin().targets().unwrap().len(), 1);
    // What is gone before it is added cannot be added.
    broker.admin().remove_target("fake").unwrap();
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains("not confirmed"), "{message}");
}

#[test]
fn vmms_without_a_firmware_are_confirmed_by_the_map_that_they_leave() {
    let broker = TestBroker::start();
    // The answer of both APIs.
    let directory = tempfile::tempdir().unwrap();
    let api = directory.path().join("api.sock");
    let listener = UnixListener::bind(&api).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let body = json!({ "config": { "memory": { "size": SIZE, "zones": null } }, "mem_size_mib": 32 });
            let body = body.to_string();
            let answer = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let by_api = format!("path={}", api.display());
    // Cloud Hypervisor does not seal its memory, Firecracker does where it shares it.
    let cases: [(&str, &str, &[&str], bool); 4] = [
        ("cloud-hypervisor", "unsealed bootmap", &["--memory", "size=32M,shared=on"], true),
        ("cloud-hypervisor", "unsealed bootmap", &["--api-socket", &by_api], true),
        ("cloud-hypervisor", "sealed bootmap", &["--memory", "size=32M"], false),
        ("firecracker", "sealed bootmap", &["--api-sock", &api.display().to_string()], false),
    ];
    for (program, spec, arguments, is_copied) in cases {
        let fake = Fake::start_as(program, spec, arguments);
        let which = Which::Pid(fake.pid());
        let added = broker.admin().add_target(&which, Some("micro")).unwrap();
        assert_eq!(
            (added.evidence, added.copied.is_some()),
            (Evidence::RulesAndBootMap, is_copied)
        );
        assert_eq!(added.regions.iter().map(|region| region.len).sum::<u64>(), SIZE - 0x2_0000);
        drop(fake);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
    for (spec, arguments, words) in [
        (
            "sealed",
            &["--memory", "size=32M,shared=on"][..],
            "that the guest was started with is not found",
        ),
        ("sealed bootmap", &["--memory", "size=64M"], "no memory of 64M"),
        ("sealed bootmap", &["--memory", "size=32M,hotplug_size=1G"], "may have been plugged in"),
        ("sealed bootmap", &["--memory", "size=32M", "--platform", "sev_snp=on"], "AMD SEV-SNP"),
        ("sealed bootmap", &["--api-socket", "/nowhere"], "how much RAM there is"),
    ] {
        let fake = Fake::start_as("cloud-hypervisor", spec, arguments);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains(words), "{spec} {arguments:?}: {message}");
    }
}

#[test]
fn ram_in_two_parts_is_found_wherever_it_lies() {
    let broker = TestBroker::start();
    let cases = [
        // Firecracker up to 1.12 has another hole than later ones.
        ("firecracker", "parts apart 3328 768", 3328u64, 768u64, false),
        ("firecracker", "parts apart 3072 1024", 3072, 1024, false),
        ("cloud-hypervisor", "parts apart 3072 1024", 3072, 1024, false),
        ("firecracker", "parts merged 3328 768", 3328, 768, true),
        ("firecracker", "parts reversed 3328 768", 3328, 768, true),
        ("cloud-hypervisor", "parts merged 3072 1024", 3072, 1024, true),
        ("cloud-hypervisor", "parts reversed 3072 1024", 3072, 1024, true),
    ];
    for (program, spec, low, high, is_copied) in cases {
        let (low, high) = (low << 20, high << 20);
        let option = if program == "firecracker" { "--mem" } else { "--memory" };
        let fake = Fake::start_as(program, spec, &[option, "4G"]);
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(found.attachable && found.copied == is_copied, "{spec}: {found:?}");
        let added = broker.admin().add_target(&Which::Pid(fake.pid()), Some("parts")).unwrap();
        assert_eq!(
            (added.evidence, added.copied.is_some()),
            (Evidence::RulesAndBootMap, is_copied),
            "{spec}"
        );
        let ends: Vec<u64> = added.regions.iter().map(|region| region.gpa + region.len).collect();
        assert_eq!(ends, [0xa_0000, low, (1 << 32) + high], "{program} {spec}");
        let tool = Tool::listen(&broker, "tool.sock");
        broker.admin().hook("parts", &tool.endpoint).unwrap();
        let mut session = tool.accept();
        let mut read = |gpa, size| session.ask(Request::ReadPhysical { gpa, size }).unwrap();
        assert_eq!(read(low - 3, 3), b"low", "{program} {spec}");
        assert_eq!(read((1 << 32) + 0x5000, 4), b"high", "{program} {spec}");
        drop(fake);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
        std::fs::remove_file(broker.directory.path().join("tool.sock")).unwrap();
    }
    // What the guest was started with is something else.
    let fake = Fake::start_as("cloud-hypervisor", "parts apart 3328 768", &["--memory", "4G"]);
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains("no memory of 1G"), "{message}");
}
