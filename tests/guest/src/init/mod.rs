// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Process 1 of a test VM.

pub mod device;
pub mod disk;
pub mod loopback;
pub mod module;
pub mod mount;
pub mod role;

use std::process::Command;
use std::{fs, io};

use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use self::role::Role;

/// Sets the VM up, runs its role in a process of its own, reaps orphans meanwhile, then powers off.
///
/// # Errors
/// When the VM is of no use; it has then been powered off unless that failed, too.
pub fn run() -> io::Result<()> {
    let result = set_up().and_then(supervise);
    if let Err(error) = &result {
        eprintln!("kvmmem-guest: {error}");
    }
    power_off()?;
    result
}

/// Powers the machine off.
///
/// # Errors
/// When the kernel refuses.
pub fn power_off() -> io::Result<()> {
    rustix::fs::sync();
    Ok(reboot(RebootCommand::PowerOff)?)
}

fn set_up() -> io::Result<Role> {
    mount::mount_all()?;
    let line = fs::read_to_string("/proc/cmdline")?;
    std::thread::spawn(stir_random);
    let role = Role::from_command_line(&line)
        .ok_or_else(|| io::Error::other("kvmmem.role= is missing on the kernel's command line"))?;
    for folder in ["/root", "/home"] {
        fs::create_dir_all(folder)?;
    }
    if let Err(error) = loopback::up() {
        eprintln!("kvmmem-guest: lo: {error}");
    }
    // So that a VMM gets large pages for its guest's RAM where it asks for them.
    let _ = fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise");
    module::load_all()?;
    device::set_permissions();
    disk::mount()?;
    Ok(role)
}

/// Makes the kernel gather entropy, which a VM without devices has none of.
///
/// Only a blocking getrandom(2) makes it do so; a program that polls /dev/random instead would wait
/// for ever.
fn stir_random() {
    if let Err(error) = rustix::rand::getrandom(&mut [0; 16], rustix::rand::GetRandomFlags::empty())
    {
        eprintln!("kvmmem-guest: getrandom: {error}");
    }
}

fn supervise(role: Role) -> io::Result<()> {
    let verb = match role {
        Role::Agent => "agent",
        Role::Host => "host",
    };
    let child = Command::new("/proc/self/exe").arg(verb).spawn()?;
    let main = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == main => {
                println!("kvmmem-guest: {verb} ended: {status:?}");
                return Ok(());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
