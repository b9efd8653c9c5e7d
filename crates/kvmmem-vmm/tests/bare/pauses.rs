// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers and pauses of a machine, by a broker's client.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kvmmem_broker::Server;
use kvmmem_client::admin::Admin;
use kvmmem_vmm::{Control, VmExit};

use crate::fixture::{config, has_kvm, wait_until};
use crate::guest::{Guest, PML4};

/// The name of [`config`]'s machine.
const NAME: &str = "bare";

/// Where bare guests have their code.
const CODE: std::ops::Range<u64> = 0x20_0000..0x21_0000;

/// CR0.PG, and EFER.LMA.
const PAGING: u64 = 1 << 31;
const LONG_MODE: u64 = 1 << 10;

#[test]
fn a_client_of_the_broker_sees_and_stops_the_vcpus() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (socket, serial) = (directory.path().join("broker"), directory.path().join("serial"));
    let serve = |server: Server, stopped: UnixStream| server.run(stopped.as_fd());
    let server = Server::bind(&socket, None).unwrap();
    let (stop_broker, stopped) = UnixStream::pair().unwrap();
    let serving = std::thread::spawn(move || serve(server, stopped));

    let guest = Guest::default().repeat(u32::MAX, |guest| guest.report_memory(0x60_0000)).spin();
    let mut config = config(&guest, directory.path());
    // The second one waits to be started.
    (config.vcpus, config.introspector, config.introspectable) = (2, false, true);
    config.broker = Some(socket.clone());
    let control = Control::new();
    let stop = control.stop_handle();
    let machine = std::thread::spawn(move || kvmmem_vmm::run(config, control));
    wait_for_more(&serial);

    let mut admin = Admin::connect(&socket).unwrap();
    // The first vCPU may run before the second one has started, and the broker asks for both.
    let deadline = Instant::now() + Duration::from_secs(60);
    let running = loop {
        match admin.registers(NAME) {
            Ok(running) => break running,
            Err(error) => assert!(
                error.to_string().contains("the VM is starting") && Instant::now() < deadline,
                "{error}"
            ),
        }
    };
    assert_eq!(running.len(), 2);
    let vcpu = &running[0];
    assert_eq!(vcpu.cr3, PML4);
    assert!(CODE.contains(&vcpu.rip) && vcpu.cr0 & PAGING != 0, "{vcpu:x?}");
    assert!(vcpu.efer.is_some_and(|efer| efer & LONG_MODE != 0), "{vcpu:x?}");
    assert_eq!((vcpu.lstar, vcpu.kernel_gs_base), (Some(0), Some(0)));
    assert_eq!(running[1].cr0 & PAGING, 0);

    assert!(admin.pause(NAME).unwrap());
    let (length, stopped) = (length(&serial), admin.registers(NAME).unwrap());
    for _ in 0..100 {
        assert!(admin.pause(NAME).unwrap());
        assert_eq!(admin.registers(NAME).unwrap(), stopped);
    }
    assert_eq!(self::length(&serial), length);
    admin.resume(NAME).unwrap();
    wait_for_more(&serial);
    // A client that ends, and a broker that does.
    admin.pause(NAME).unwrap();
    drop(admin);
    wait_for_more(&serial);
    let mut admin = Admin::connect(&socket).unwrap();
    admin.pause(NAME).unwrap();
    drop(stop_broker);
    serving.join().unwrap().unwrap();
    wait_for_more(&serial);

    // The next broker; a machine that is stopped ends though it is paused.
    let server = Server::bind(&socket, None).unwrap();
    let (stop_broker, stopped) = UnixStream::pair().unwrap();
    let serving = std::thread::spawn(move || serve(server, stopped));
    wait_until(|| Admin::connect(&socket).is_ok_and(|mut admin| admin.registers(NAME).is_ok()));
    let mut admin = Admin::connect(&socket).unwrap();
    admin.pause(NAME).unwrap();
    stop.stop();
    assert_eq!(machine.join().unwrap().unwrap(), VmExit::Stopped);
    drop((admin, stop_broker));
    serving.join().unwrap().unwrap();
}

fn length(serial: &Path) -> u64 {
    serial.metadata().map_or(0, |file| file.len())
}

/// Waits until the guest has reported more than it has now.
fn wait_for_more(serial: &Path) {
    let before = length(serial);
    wait_until(|| length(serial) > before);
}
