// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes at the guest endpoint, from a tool and to one: frames are taken one after the other,
//! and what is taken is written and read again.
#![no_main]

use kvmmem_proto::guest::{self, MAX_FRAME};
use kvmmem_proto::guest::{FromTool, ToTool};
use kvmmem_proto::message::Refusal;

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|bytes: &[u8]| {
    check::<FromTool>(bytes);
    check::<ToTool>(bytes);
    let words = String::from_utf8_lossy(bytes);
    let refused = ToTool::refused(Refusal::Invalid, &words);
    let mut written = Vec::new();
    guest::write(&mut written, &refused).expect("every refusal fits");
    assert_eq!(guest::read::<ToTool>(&mut &written[..]).expect("our own frame"), Some(refused));
});

fn check<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some(message)) = guest::read::<T>(&mut rest) {
        let mut written = Vec::new();
        match guest::write(&mut written, &message) {
            Ok(()) => assert!(written.len() <= 4 + MAX_FRAME),
            // Escaped in another way it may be longer.
            Err(guest::FrameError::Length(_)) => continue,
            Err(error) => panic!("a message that was read: {error}"),
        }
        assert_eq!(
            guest::read::<T>(&mut &written[..]).expect("a frame that was written"),
            Some(message)
        );
    }
}
