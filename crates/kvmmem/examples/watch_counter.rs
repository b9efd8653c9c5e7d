// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Maps a page of a target and watches its first word change, without a further call:
//! `watch_counter vsock:1234 0x100000`.

use std::error::Error;
use std::thread::sleep;
use std::time::Duration;

use kvmmem::{Device, Listener};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(endpoint), Some(gpa)) = (args.next(), args.next()) else {
        return Err("usage: watch_counter vsock:PORT|unix:PATH GPA".into());
    };
    let gpa = u64::from_str_radix(gpa.trim_start_matches("0x"), 16)?;

    let listener = Listener::bind(&endpoint.parse()?)?;
    let mut target = listener.accept(Duration::from_secs(30))?;
    let page = Device::open_default()?.map(target.map_token()?, gpa)?;

    let mut last = page.read_u64(0)?;
    for _ in 0..1000 {
        sleep(Duration::from_millis(10));
        let now = page.read_u64(0)?;
        if now != last {
            println!("{last:#x} -> {now:#x}");
            last = now;
        }
    }

    let own = page.unmap()?;
    println!("unmapped; the page holds {:#x} now", own.read_u64(0)?);
    Ok(())
}
