// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames, as they are written and read.

use proptest::prelude::*;

use super::*;

fn refusals() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        Just(Refusal::Malformed),
        Just(Refusal::Invalid),
        Just(Refusal::Exists),
        Just(Refusal::Unknown),
        Just(Refusal::Denied),
        Just(Refusal::Limit),
        Just(Refusal::Busy),
    ]
}

/// Bytes of which `now` have come.
struct Pieces<'a> {
    left: &'a [u8],
    now: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.now);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.now -= count;
        self.left.read(buffer.get_mut(..count).unwrap())
    }
}

proptest! {
    #[test]
    fn a_question_is_read_as_it_was_written(
        words: [u64; 4],
        read_only: bool,
        pid: u32,
        uid: u32,
        comm in ".{0,16}",
        rest: Vec<u8>,
    ) {
        let caller = Caller { pid, uid, comm };
        let question = FromTool::Open { token: Token::new(words), read_only, caller, mapped_by: MappedBy::Module };
        let mut bytes = Vec::new();
        write(&mut bytes, &question).unwrap();
        prop_assert!(bytes.len() <= 4 + MAX_FRAME);
        // What follows is the next frame's.
        bytes.extend(&rest);
        let mut left = &bytes[..];
        prop_assert_eq!(read(&mut left).unwrap(), Some(question));
        prop_assert_eq!(left, &rest[..]);
    }

    #[test]
    fn a_frame_may_come_in_pieces(words: [u64; 4], pieces in proptest::collection::vec(1usize..40, 1..20)) {
        let caller = Caller { pid: 1, uid: 2, comm: "scan".into() };
        let question = FromTool::Open { token: Token::new(words), read_only: true, caller, mapped_by: MappedBy::Module };
        let mut bytes = Vec::new();
        write(&mut bytes, &question).unwrap();
        let mut pieces = pieces.iter().cycle();
        let mut frame = Frame::default();
        let mut from = Pieces { left: &bytes, now: 0 };
        let read = loop {
            match frame.read(&mut from) {
                Err(FrameError::Read(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    from.now = *pieces.next().unwrap();
                }
                read => break read.unwrap(),
            }
        };
        prop_assert_eq!(read, Some(question));
        prop_assert!(from.left.is_empty());
    }

    #[test]
    fn every_refusal_fits_in_a_frame(refusal in refusals(), words in "(?s).{0,3000}") {
        let message = ToTool::refused(refusal, &words);
        let mut bytes = Vec::new();
        write(&mut bytes, &message).unwrap();
        prop_assert_eq!(read(&mut &bytes[..]).unwrap(), Some(message));
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
        let _ = read::<FromTool>(&mut &bytes[..]);
        let _ = read::<ToTool>(&mut &bytes[..]);
    }

    #[test]
    fn a_frame_that_ends_early_is_none(cut in 1usize..17) {
        let mut bytes = Vec::new();
        write(&mut bytes, &ToTool::Opened { view: 1, ticket: Token::new([1; 4]) }).unwrap();
        bytes.truncate(bytes.len() - cut);
        let error = read::<ToTool>(&mut &bytes[..]).unwrap_err();
        prop_assert!(matches!(error, FrameError::Read(_)), "{}", error);
    }
}

#[test]
fn a_frame_is_written_as_the_text_says() {
    let token = Token::from_bytes(&std::array::from_fn(|n| u8::try_from(n).unwrap()));
    let caller = Caller { pid: 411, uid: 0, comm: "scan".into() };
    let mut bytes = Vec::new();
    write(
        &mut bytes,
        &FromTool::Open { token, read_only: true, caller, mapped_by: MappedBy::Module },
    )
    .unwrap();
    let text = "{\"open\":{\"token\":\"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\",\
                \"read_only\":true,\"caller\":{\"pid\":411,\"uid\":0,\"comm\":\"scan\"},\
                \"mapped_by\":\"module\"}}";
    assert_eq!(bytes[..4], u32::try_from(text.len()).unwrap().to_le_bytes());
    assert_eq!(str::from_utf8(&bytes[4..]).unwrap(), text);
    let mut bytes = Vec::new();
    write(&mut bytes, &ToTool::Opened { view: 17, ticket: Token::new([0; 4]) }).unwrap();
    let zeros = "0".repeat(64);
    assert_eq!(
        str::from_utf8(&bytes[4..]).unwrap(),
        format!("{{\"opened\":{{\"view\":17,\"ticket\":\"{zeros}\"}}}}")
    );
    let mut bytes = Vec::new();
    write(&mut bytes, &ToTool::refused(Refusal::Unknown, "no\n\"such\" token")).unwrap();
    assert_eq!(
        str::from_utf8(&bytes[4..]).unwrap(),
        r#"{"refused":{"refusal":"unknown","message":"no \"such\" token"}}"#
    );
}

#[test]
fn the_length_is_bounded_before_anything_is_read() {
    for length in [0, 0x1001, u32::MAX] {
        let bytes = length.to_le_bytes();
        assert!(
            matches!(read::<ToTool>(&mut &bytes[..]), Err(FrameError::Length(_))),
            "{length:#x}"
        );
    }
    assert!(read::<ToTool>(&mut &[][..]).unwrap().is_none());
    let long = ToTool::Refused { refusal: Refusal::Limit, message: "x".repeat(MAX_FRAME) };
    assert!(matches!(write(&mut Vec::new(), &long), Err(FrameError::Length(_))));
    let error = read::<FromTool>(&mut &b"\x02\0\0\0{}"[..]).unwrap_err();
    assert!(matches!(error, FrameError::Malformed(_)), "{error}");
}
