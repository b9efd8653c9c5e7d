// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attaches a view, by the token in KVMMEM_TOKEN (as `kvmmem grant create` prints it), and prints
//! what it reaches and the first bytes of each range: `KVMMEM_TOKEN=... view_read`, in a virtual
//! machine or on the host.

use std::error::Error;

use kvmmem::{Access, View};

fn main() -> Result<(), Box<dyn Error>> {
    let text = std::env::var("KVMMEM_TOKEN")
        .map_err(|_| "set KVMMEM_TOKEN, see kvmmem grant create --help")?;
    let view = View::attach(&text.parse()?, Access::ReadOnly)?;

    let status = view.status()?;
    println!("target {:02x?}, generation {}", status.uuid, status.generation);
    for range in status.ranges {
        let mut bytes = [0; 64];
        view.read_at(range.gpa, &mut bytes)?;
        println!("{range}, {} KiB:", range.len >> 10);
        for (line, address) in bytes.chunks(16).zip((range.gpa..).step_by(16)) {
            println!("  {address:#014x}  {line:02x?}");
        }
    }
    view.detach()?;
    Ok(())
}
