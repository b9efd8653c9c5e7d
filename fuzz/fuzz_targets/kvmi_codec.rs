// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes to both directions of the KVMI codec; what is taken encodes to the same meaning again.
#![no_main]

use kvmmem_kvmi::handshake::{ToolHello, VmHello};
use kvmmem_kvmi::message::{HEADER_SIZE, Header, VcpuHeader};
use kvmmem_kvmi::reply::{self, Fixed, GuestInfo, MapToken, MaxGfn, PhysicalSlot, Version};
use kvmmem_kvmi::request::Request;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(hello) = VmHello::receive(&mut &*bytes) {
        let again = VmHello::receive(&mut &hello.encode()[..]).expect("our own hello");
        assert_eq!(again.uuid, hello.uuid);
    }
    let _ = ToolHello::receive(&mut &*bytes);
    let _ = reply::decode(bytes);
    let _ = Version::decode(bytes);
    let _ = GuestInfo::decode(bytes);
    let _ = MaxGfn::decode(bytes);
    let _ = PhysicalSlot::decode(bytes);
    let _ = MapToken::decode(bytes).token();
    let _ = VcpuHeader::check(bytes, 4);

    let Some(header) = Header::parse(bytes) else { return };
    let payload = &bytes[HEADER_SIZE..];
    if let Ok(request) = Request::decode(header.id.get(), payload) {
        let mut encoded = Vec::new();
        request.encode(header.seq.get(), &mut encoded).expect("a request that was decoded");
        assert_eq!(Request::decode(request.id(), &encoded[HEADER_SIZE..]), Ok(request));
    }
});
