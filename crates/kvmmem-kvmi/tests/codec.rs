// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The codec's bytes, both ways.

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::handshake::{ToolHello, VmHello};
use kvmmem_kvmi::message::{Header, VcpuHeader};
use kvmmem_kvmi::reply::{
    self, Fixed, GuestInfo, MapToken, MaxGfn, Outcome, PhysicalSlot, Version,
};
use kvmmem_kvmi::request::Request;
use proptest::prelude::*;

fn encoded(request: Request<'_>, seq: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    request.encode(seq, &mut bytes).unwrap();
    bytes
}

#[test]
fn requests_have_the_protocol_s_bytes() {
    assert_eq!(encoded(Request::GetVersion, 0x0102_0304), [2, 0, 0, 0, 4, 3, 2, 1]);
    assert_eq!(
        encoded(Request::CheckCommand(17), 1),
        [3, 0, 8, 0, 1, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        encoded(Request::CheckEvent(10), 1),
        [4, 0, 8, 0, 1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(encoded(Request::GetGuestInfo, 7), [5, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(
        encoded(Request::ReadPhysical { gpa: 0x1_0000_0ff8, size: 8 }, 2),
        [17, 0, 16, 0, 2, 0, 0, 0, 0xf8, 0x0f, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        encoded(Request::WritePhysical { gpa: 0x1000, data: b"abc" }, 3),
        [
            18, 0, 19, 0, 3, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, b'a',
            b'b', b'c'
        ]
    );
    assert_eq!(encoded(Request::GetMapToken, 4), [22, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(
        encoded(Request::ControlCmdResponse { enable: false, now: true }, 5),
        [27, 0, 8, 0, 5, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(encoded(Request::GetMaxGfn, 6), [29, 0, 0, 0, 6, 0, 0, 0]);
    assert_eq!(
        encoded(Request::QueryPhysical { gfn: 0x0102 }, 6),
        [39, 0, 8, 0, 6, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn a_request_that_the_server_would_refuse_is_not_encoded() {
    let mut bytes = vec![9];
    for bad in [
        Request::ReadPhysical { gpa: 0, size: 0 },
        Request::ReadPhysical { gpa: 1, size: 4096 },
        Request::ReadPhysical { gpa: 0xfff, size: 2 },
        Request::WritePhysical { gpa: 0, data: &[] },
        Request::WritePhysical { gpa: 0, data: &[0; 4097] },
        Request::WritePhysical { gpa: 0, data: &[0; 70_000] },
    ] {
        assert_eq!(bad.encode(1, &mut bytes), Err(KvmError::Inval), "{bad:?}");
    }
    assert_eq!(bytes, [9]);
}

#[test]
fn bad_payloads_are_einval() {
    let read = |gpa: u64, size: u64| [gpa.to_le_bytes(), size.to_le_bytes()].concat();
    let bad: &[(u16, Vec<u8>)] = &[
        (2, vec![0]),
        (3, vec![]),
        (3, vec![2, 0, 1, 0, 0, 0, 0, 0]),
        (3, vec![2, 0, 0, 0, 0, 0, 0, 1]),
        (4, vec![2, 0, 0, 0, 0, 0, 0, 0, 0]),
        (17, read(0, 0)),
        (17, read(0, 4097)),
        (17, read(1, 4096)),
        (17, read(u64::MAX, 2)),
        (17, read(0, u64::MAX)),
        (17, vec![0; 15]),
        (18, read(0, 1)),
        (18, [read(0, 1), vec![0; 2]].concat()),
        (27, vec![1, 1, 1, 0, 0, 0, 0, 0]),
        (27, vec![1, 1, 0, 0, 0, 0, 1, 0]),
        (29, vec![0; 8]),
        (39, vec![]),
        (39, vec![0; 7]),
        (39, vec![0; 16]),
    ];
    for (id, payload) in bad {
        assert_eq!(
            Request::decode(*id, payload),
            Err(KvmError::Inval),
            "command {id}, {payload:x?}"
        );
    }
    assert!(Request::decode(17, &read(0xfff, 1)).is_ok());
    assert!(Request::decode(17, &read(!0xfff, 4096)).is_ok());
}

#[test]
fn replies_have_the_protocol_s_bytes() {
    let prefix = reply::prefix(17, 0x0a0b_0c0d, Err(KvmError::Inval), 0).unwrap();
    assert_eq!(prefix, [17, 0, 8, 0, 0x0d, 0x0c, 0x0b, 0x0a, 0xea, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let prefix = reply::prefix(2, 1, Ok(()), 16).unwrap();
    assert_eq!(prefix, [2, 0, 24, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(reply::prefix(2, 1, Ok(()), 0xffff), None);
    assert_eq!(size_of::<Version>(), 16);
    assert_eq!(size_of::<GuestInfo>(), 16);
    assert_eq!(size_of::<MaxGfn>(), 8);
    assert_eq!(size_of::<PhysicalSlot>(), 16);
    assert_eq!(size_of::<MapToken>(), 32);
}

#[test]
fn fixed_replies_are_extended_and_cut() {
    assert_eq!(Version::decode(&[1, 0, 0, 0, 0, 0, 0, 0]), Version::OURS);
    let mut long = [0; 24];
    long[0] = 3;
    assert_eq!(GuestInfo::decode(&long), GuestInfo::new(3));
    let token: Vec<u8> = (0..32).collect();
    assert_eq!(MapToken::decode(&token).token().to_bytes(), *token);
}

#[test]
fn reply_payloads_are_split() {
    assert_eq!(reply::decode(&[0, 0, 0, 0, 0, 0, 0, 0, 9]), Ok(Outcome::Done(&[9])));
    assert_eq!(
        reply::decode(&[0xfe, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
        Ok(Outcome::Failed(KvmError::NoEnt))
    );
    assert_eq!(reply::decode(&[0; 7]), Err(reply::DecodeError::Short(7)));
    assert_eq!(reply::decode(&[5, 0, 0, 0, 0, 0, 0, 0]), Err(reply::DecodeError::Code(5)));
    assert_eq!(
        reply::decode(&[0, 0, 0, 0x80, 0, 0, 0, 0]),
        Err(reply::DecodeError::Code(i32::MIN))
    );
}

#[test]
fn vcpu_headers_are_checked() {
    assert!(VcpuHeader::check(&[1, 0, 0, 0, 0, 0, 0, 0, 7], 2).is_ok());
    assert!(VcpuHeader::check(&[2, 0, 0, 0, 0, 0, 0, 0], 2).is_err());
    assert!(VcpuHeader::check(&[0, 0, 1, 0, 0, 0, 0, 0], 2).is_err());
    assert!(VcpuHeader::check(&[0, 0, 0, 0, 0, 0, 0, 1], 2).is_err());
    assert!(VcpuHeader::check(&[0; 7], 2).is_err());
}

#[test]
fn hellos_have_the_protocol_s_bytes() {
    let uuid = *b"0123456789abcdef";
    let hello = VmHello { uuid, start_time_ms: -2, name: "tiger".into() };
    let bytes = hello.encode();
    assert_eq!(bytes[..4], 96u32.to_le_bytes());
    assert_eq!(bytes[4..20], uuid);
    assert_eq!(bytes[20..24], [0; 4]);
    assert_eq!(bytes[24..32], (-2i64).to_le_bytes());
    assert_eq!(&bytes[32..38], b"tiger\0");
    assert_eq!(VmHello::receive(&mut &bytes[..]).unwrap(), hello);

    let mut answer = ToolHello { cookie_hash: [7; 20] }.encode().to_vec();
    assert_eq!(answer[..4], 24u32.to_le_bytes());
    assert_eq!(ToolHello::receive(&mut &answer[..]).unwrap().cookie_hash, [7; 20]);
    answer[0] = 23;
    assert!(ToolHello::receive(&mut &answer[..]).is_err());
}

#[test]
fn hellos_of_other_sizes_are_read() {
    let mut bytes = [0; 200];
    bytes[0] = 200;
    bytes[32] = b'x';
    let mut stream = &bytes[..];
    assert_eq!(VmHello::receive(&mut stream).unwrap().name, "x");
    assert!(stream.is_empty());
    bytes[0] = 32;
    assert_eq!(VmHello::receive(&mut &bytes[..]).unwrap().name, "");
    bytes[0] = 31;
    assert!(VmHello::receive(&mut &bytes[..]).is_err());
    assert!(VmHello::receive(&mut &[0xff; 200][..]).is_err());
}

#[test]
fn a_long_name_is_cut_at_a_character() {
    let hello = VmHello { uuid: [0; 16], start_time_ms: 0, name: "ä".repeat(40) };
    assert_eq!(VmHello::receive(&mut &hello.encode()[..]).unwrap().name, "ä".repeat(31));
}

proptest! {
    #[test]
    fn any_payload_is_decoded_or_refused(id in 0u16..64, payload in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(request) = Request::decode(id, &payload) {
            let bytes = encoded(request, 1);
            let header = Header::parse(&bytes).unwrap();
            prop_assert_eq!(header.id.get(), id);
            prop_assert_eq!(Request::decode(id, &bytes[8..]), Ok(request));
        }
    }

    #[test]
    fn any_transfer_keeps_to_its_page(gpa: u64, size: u64) {
        let payload = [gpa.to_le_bytes(), size.to_le_bytes()].concat();
        let fits = size > 0 && size <= 4096 && (gpa & 0xfff) + size <= 4096;
        prop_assert_eq!(Request::decode(17, &payload).is_ok(), fits);
    }

    #[test]
    fn any_hello_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = VmHello::receive(&mut &bytes[..]);
        let _ = ToolHello::receive(&mut &bytes[..]);
        let _ = reply::decode(&bytes);
        let _ = Version::decode(&bytes);
    }
}
