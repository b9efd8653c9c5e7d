// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages, as they are written and read.

use super::*;

#[test]
fn a_redeem_is_written_as_the_text_says() {
    let token = Token::from_bytes(&std::array::from_fn(|n| u8::try_from(n * 8 + 1).unwrap()));
    let request = Request { id: 1, call: Call::Redeem { token: token.clone() } };
    let text = serde_json::to_string(&request).unwrap();
    let digits = "0109111921293139414951596169717981899199a1a9b1b9c1c9d1d9e1e9f1f9";
    assert_eq!(text, format!("{{\"id\":1,\"call\":{{\"redeem\":{{\"token\":\"{digits}\"}}}}}}"));
    let read: Request = serde_json::from_str(&text.replace('f', "F")).unwrap();
    assert!(matches!(read.call, Call::Redeem { token: read } if read == token));
}

#[test]
fn an_attach_may_leave_out_what_it_wants_to_reach() {
    let token = Token::from_bytes(&[0x11; 32]);
    let caller = Caller { pid: 1, uid: 2, comm: "tool".into() };
    let attach = |reaching| {
        let (token, caller) = (token.clone(), caller.clone());
        Request { id: 1, call: Call::Attach { token, caller, read_only: true, reaching } }
    };
    let text = serde_json::to_string(&attach(Vec::new())).unwrap();
    let digits = "11".repeat(32);
    let caller = r#""caller":{"pid":1,"uid":2,"comm":"tool"}"#;
    assert_eq!(
        text,
        format!(
            r#"{{"id":1,"call":{{"attach":{{"token":"{digits}",{caller},"read_only":true}}}}}}"#
        )
    );
    let span = Span { gpa: 0x1000, len: 0x2000 };
    let with = serde_json::to_string(&attach(vec![span])).unwrap();
    assert_eq!(with, text.replace("true}", r#"true,"reaching":[{"gpa":4096,"len":8192}]}"#));
    for (text, spans) in [(text, vec![]), (with, vec![span])] {
        let read: Request = serde_json::from_str(&text).unwrap();
        assert!(matches!(read.call, Call::Attach { reaching, .. } if reaching == spans));
    }
}

#[test]
fn what_is_no_token_is_refused_without_repeating_it() {
    for digits in ["", "00", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64), &"é".repeat(32)] {
        let text = format!("{{\"id\":1,\"call\":{{\"redeem\":{{\"token\":\"{digits}\"}}}}}}");
        let error = serde_json::from_str::<Request>(&text).unwrap_err().to_string();
        assert!(error.contains("64 hexadecimal digits"), "{error}");
    }
}

#[test]
fn the_identity_of_a_vm_is_flat_in_lists_and_registrations() {
    const IDENTITY: &str = r#""name":"web","uuid":"00000000-0000-0000-0000-000000000000","vcpus":1,"start_time_ms":0,"cid":null,"introspectable":true,"introspector":false"#;
    let identity = VmIdentity::target("web", uuid::Uuid::nil());
    let listed =
        TargetInfo { id: 1, identity: identity.clone(), memory_bytes: 0, pid: 7, hooks: vec![] };
    let text = serde_json::to_string(&listed).unwrap();
    assert_eq!(text, format!(r#"{{"id":1,{IDENTITY},"memory_bytes":0,"pid":7,"hooks":[]}}"#));
    assert_eq!(serde_json::from_str::<TargetInfo>(&text).unwrap(), listed);
    let registration = identity.registered(vec![]);
    let text = serde_json::to_string(&registration).unwrap();
    assert_eq!(text, format!(r#"{{{IDENTITY},"regions":[]}}"#));
    assert_eq!(serde_json::from_str::<Registration>(&text).unwrap(), registration);
}
