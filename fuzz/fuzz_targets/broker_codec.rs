// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any packet to the broker, and any packet from it; what is taken is written and read again.
#![no_main]

use kvmmem_broker::endpoint::Endpoint;
use kvmmem_broker::map::MemoryMap;
use kvmmem_broker::wire::{Call, FromBroker, MAX_PACKET, Request};
use libfuzzer_sys::fuzz_target;
use serde_json::{from_slice, to_vec};

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() > MAX_PACKET {
        return;
    }
    if let Ok(text) = str::from_utf8(bytes)
        && let Ok(endpoint) = text.parse::<Endpoint>()
    {
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
    }
    if let Ok(request) = from_slice::<Request>(bytes) {
        let written = to_vec(&request).expect("a request that was read");
        let again: Request = from_slice(&written).expect("a request that was written");
        assert_eq!(to_vec(&again).expect("once more"), written);
        if let Call::Register(registration) = request.call
            && let Ok(map) = MemoryMap::new(registration.regions)
        {
            for region in map.regions() {
                assert_eq!(map.resolve(region.gpa), Some(region.offset));
                assert_eq!(map.resolve(region.gpa + region.len - 1), Some(region.offset + region.len - 1));
            }
            assert_eq!(map.resolve(map.end_gfn() * 4096), None);
        }
    }
    if let Ok(message) = from_slice::<FromBroker>(bytes) {
        let written = to_vec(&message).expect("a message that was read");
        assert!(from_slice::<FromBroker>(&written).is_ok());
    }
});
