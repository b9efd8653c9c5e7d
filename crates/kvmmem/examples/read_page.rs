// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads one page of a target over KVMI and prints its first bytes: `read_page vsock:1234
//! 0x100000`.

use std::error::Error;
use std::time::Duration;

use kvmmem::{Listener, PAGE_SIZE};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(endpoint), Some(gpa)) = (args.next(), args.next()) else {
        return Err("usage: read_page vsock:PORT|unix:PATH GPA".into());
    };
    let gpa = u64::from_str_radix(gpa.trim_start_matches("0x"), 16)?;

    let listener = Listener::bind(&endpoint.parse()?)?;
    let mut target = listener.accept(Duration::from_secs(30))?;
    let max_gfn = target.max_gfn()?;
    println!("{:?} has frames below {max_gfn:#x}", target.name());

    let mut page = [0; PAGE_SIZE];
    target.read_physical(gpa, &mut page)?;
    for (line, address) in page.chunks(16).zip((gpa..).step_by(16)).take(8) {
        println!("{address:#014x}  {line:02x?}");
    }
    Ok(())
}
