//! Tests of the module above.

use proptest::prelude::*;

use super::*;

fn parse(line: &str) -> Result<Peer, IdentificationError> {
    Peer::parse(line.as_bytes())
}

#[test]
fn refuses_identification_that_is_not_ours_or_not_ssh() {
    let long = format!("SSH-2.0-{}", "x".repeat(246));
    for (line, error) in [
        ("", IdentificationError::NotSsh(String::new())),
        ("GET / HTTP/1.1", IdentificationError::NotSsh("GET / HTTP/1.1".into())),
        ("\u{1b}[2J", IdentificationError::NotSsh("\\x1b[2J".into())),
        ("SSH-1.5-old", IdentificationError::SshVersion),
        ("SSH-2.0-a\tb", IdentificationError::Character),
        ("SSH-2.0-a\0", IdentificationError::Character),
        ("SSH-2.0-caponier_2 client", IdentificationError::Major(2)),
        ("SSH-2.0-caponier_ client", IdentificationError::Malformed),
        ("SSH-2.0-caponier_+1", IdentificationError::Malformed),
        ("SSH-2.0-caponier_01", IdentificationError::Malformed),
        ("SSH-2.0-caponier_4294967297", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 ", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 clients", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 agent=acme", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 agent=acme/", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 agent=acme/../x", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 agent=acme/prod/r/x", IdentificationError::Malformed),
        ("SSH-2.0-caponier_1 agent=Acme/prod", IdentificationError::Malformed),
        (long.as_str(), IdentificationError::TooLong),
    ] {
        assert_eq!(parse(line), Err(error), "{line:?}");
    }
    assert_eq!(Peer::parse(b"SSH-2.0-\xff"), Err(IdentificationError::Character));
}

#[test]
fn identification_is_frozen() {
    let name: AgentName = "acme/prod-eu".parse().expect("a name");
    let line = agent_line(&name, &"node-1.a_B".parse().expect("a replica"));
    assert_eq!(line, "SSH-2.0-caponier_1 agent=acme/prod-eu/node-1.a_B");
    assert_eq!(
        parse(&line),
        Ok(Peer::Agent { name: name.clone(), replica: Some("node-1.a_B".parse().expect("a replica")) })
    );
    assert_eq!(parse("SSH-2.0-caponier_1 agent=acme/prod-eu"), Ok(Peer::Agent { name, replica: None }));
    assert_eq!(parse(CLIENT_LINE), Ok(Peer::Client));
    assert_eq!(parse(DOOR_LINE), Ok(Peer::Door));
    assert_eq!(parse("SSH-2.0-OpenSSH_9.2p1 Debian-2"), Ok(Peer::Stock));
}

#[test]
fn originator_is_frozen() {
    let originator = Originator {
        forward: "00112233445566778899aabb".parse().expect("an id"),
        principal: "provisioner".parse().expect("a principal"),
        client: "[2001:db8::1]:40000".into(),
    };
    let text = originator.to_string();
    assert_eq!(text, "caponier1:00112233445566778899aabb:provisioner:[2001:db8::1]:40000");
    assert_eq!(Originator::parse(&text), Ok(Some(originator)));
    assert_eq!(Originator::parse("127.0.0.1"), Ok(None));
    for text in [
        "caponier1",
        "caponier2:00112233445566778899aabb:p:c",
        "caponier1:00112233445566778899aab:p:c",
        "caponier1:00112233445566778899AABB:p:c",
        "caponier1:00112233445566778899aabb:P:c",
        "caponier1:00112233445566778899aabb:p",
        "caponier1:00112233445566778899aabb:p:a b",
        "caponier1:00112233445566778899aabb:p:\n",
    ] {
        assert!(Originator::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn refusals_are_frozen() {
    for (code, number) in [
        (RefusalCode::Denied, 0xFE00_0001),
        (RefusalCode::Unresolved, 0xFE00_0002),
        (RefusalCode::ConnectFailed, 0xFE00_0003),
        (RefusalCode::Unrecorded, 0xFE00_0004),
        (RefusalCode::Limit, 0xFE00_0005),
        (RefusalCode::Draining, 0xFE00_0006),
        (RefusalCode::Malformed, 0xFE00_0007),
    ] {
        assert_eq!(code as u32, number);
        assert_eq!(RefusalCode::from_wire(number), Some(code));
    }
    assert_eq!(RefusalCode::from_wire(1), None);
    let forward = ForwardId::random();
    let text = refusal_text(Some(&forward), "not \u{7}allowed");
    assert_eq!(parse_refusal(&text), Some((forward, "not allowed".into())));
    assert_eq!(parse_refusal("open failed"), None);
}

#[test]
fn credit_is_frozen() {
    assert_eq!((CREDIT_TYPE, CREDIT_INITIAL, message_cost(0), message_cost(100)), (0xFE00_0001, 16_384, 64, 164));
    assert_eq!(&credit(0x0102_0304)[..], b"\x01\x02\x03\x04");
    assert_eq!(&credit(NO_CREDIT)[..], b"\0\0\0\0");
    assert_eq!(parse_credit(b"\x01\x02\x03\x04"), Ok(0x0102_0304));
    for data in [&b""[..], b"\0\0\0", b"\0\0\0\0\0"] {
        assert!(parse_credit(data).is_err(), "{data:?}");
    }
}

#[test]
fn hello_is_frozen() {
    let hello = Control::Hello(Hello {
        version: "0.1.0".into(),
        features: vec![],
        channels: 4096,
        replica: Some("node-1".into()),
        instance: None,
        started: None,
        way: None,
    });
    let bytes = hello.encode();
    assert_eq!(
        &bytes[..],
        b"\0\0\0\x46\0\x01{\"version\":\"0.1.0\",\"features\":[],\"channels\":4096,\"replica\":\"node-1\"}"
    );
    assert_eq!(Control::decode(&mut BytesMut::from(&bytes[..])), Ok(Some(hello)));
}

#[test]
fn hello_of_a_process_is_frozen() {
    let hello = Control::Hello(Hello {
        version: "0.2.0".into(),
        features: vec![CREDIT.into()],
        channels: 4096,
        replica: Some("node-1".into()),
        instance: Some("0123456789abcdef".parse().expect("an instance")),
        started: Some(1_790_000_000_123),
        way: Some(7),
    });
    let bytes = hello.encode();
    let body = "{\"version\":\"0.2.0\",\"features\":[\"credit\"],\"channels\":4096,\"replica\":\"node-1\",\
                \"instance\":\"0123456789abcdef\",\"started\":1790000000123,\"way\":7}";
    assert_eq!(&bytes[..], [&b"\0\0\0\x8c\0\x01"[..], body.as_bytes()].concat());
    assert_eq!(Control::decode(&mut BytesMut::from(&bytes[..])), Ok(Some(hello)));
}

#[test]
fn going_away_is_frozen() {
    for (message, frozen) in [
        (Control::Drain(Drain { deadline_s: 300 }), &b"\0\0\0\x14\0\x02{\"deadline_s\":300}"[..]),
        (Control::Move, b"\0\0\0\x04\0\x03{}"),
        (Control::Superseded, b"\0\0\0\x04\0\x04{}"),
        (Control::KeyNotice(KeyNotice { expires: 1_800_000_000 }), b"\0\0\0\x18\0\x05{\"expires\":1800000000}"),
        (Control::Examine, b"\0\0\0\x04\0\x08{}"),
        (
            Control::Examined(Report::new("remote", Vec::new())),
            b"\0\0\0\x38\0\x09{\"version\":1,\"of\":\"remote\",\"verdict\":\"ok\",\"stages\":[]}",
        ),
    ] {
        assert_eq!(&message.encode()[..], frozen);
        assert_eq!(Control::decode(&mut BytesMut::from(frozen)), Ok(Some(message)));
    }
}

#[test]
fn anchors_are_frozen() {
    let (anchor, text) = (Anchor::from([7; 32]), "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc");
    let trail = TrailId::parse("000102030405060708090a0b0c0d0e0f").expect("an id");
    let key = "SHA256:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";
    let seal = Seal { key: key.parse().expect("a fingerprint"), signature: "AAAA".to_owned() };
    let anchored = |seal| Control::Anchored(TrailAnchored { anchor, time_ms: 1_790_000_000_123, seal });
    for (message, kind, body) in [
        (
            Control::Anchor(TrailAnchor { trail, anchor }),
            6_u16,
            format!("{{\"trail\":\"000102030405060708090a0b0c0d0e0f\",\"anchor\":\"{text}\"}}"),
        ),
        (anchored(None), 7, format!("{{\"anchor\":\"{text}\",\"time\":1790000000123}}")),
        (
            anchored(Some(seal)),
            7,
            format!("{{\"anchor\":\"{text}\",\"time\":1790000000123,\"key\":\"{key}\",\"signature\":\"AAAA\"}}"),
        ),
    ] {
        assert_eq!(message.encode(), framed(kind, body.as_bytes()), "{message:?}");
        assert_eq!(Control::decode(&mut framed(kind, body.as_bytes())), Ok(Some(message)));
    }
    for (kind, body) in [
        (6, "{}".to_owned()),
        (6, format!("{{\"anchor\":\"{text}\"}}")),
        (6, format!("{{\"trail\":\"0\",\"anchor\":\"{text}\"}}")),
        (6, "{\"trail\":\"000102030405060708090a0b0c0d0e0f\",\"anchor\":\"BwcH\"}".to_owned()),
        (7, format!("{{\"anchor\":\"{text}\"}}")),
        (7, format!("{{\"anchor\":\"{text}\",\"time\":-1}}")),
        (7, format!("{{\"anchor\":\"{text}\",\"time\":1,\"key\":\"{key}\"}}")),
        (7, format!("{{\"anchor\":\"{text}\",\"time\":1,\"signature\":\"AAAA\"}}")),
        (7, format!("{{\"anchor\":\"{text}\",\"time\":1,\"key\":\"x\",\"signature\":\"AAAA\"}}")),
        (7, format!("{{\"anchor\":\"{text}\",\"time\":1,\"key\":\"{key}\",\"signature\":\"A\\u0007\"}}")),
        (7, format!("{{\"anchor\":\"{text}\",\"time\":1,\"key\":\"{key}\",\"signature\":\"{}\"}}", "A".repeat(513))),
    ] {
        assert!(Control::decode(&mut framed(kind, body.as_bytes())).is_err(), "{kind}: {body}");
    }
}

/// A message as it stands on the wire.
fn framed(kind: u16, body: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u32(u32::try_from(body.len() + 2).expect("short"));
    bytes.put_u16(kind);
    bytes.put_slice(body);
    bytes
}

#[test]
fn a_body_that_does_not_read_is_refused_and_what_a_later_version_adds_is_not() {
    let hello = "{\"version\":\"1\",\"channels\":1,";
    for (kind, body) in [
        (KIND_DRAIN, "".to_owned()),
        (KIND_DRAIN, "{}".into()),
        (KIND_DRAIN, "{\"deadline_s\":-1}".into()),
        (KIND_DRAIN, "{\"deadline_s\":4294967296}".into()),
        (KIND_DRAIN, "{\"deadline_s\":\"1\"}".into()),
        (KIND_DRAIN, "{\"deadline_s\":1} {}".into()),
        (KIND_MOVE, "".into()),
        (KIND_MOVE, "null".into()),
        (KIND_SUPERSEDED, "".into()),
        (KIND_SUPERSEDED, "1".into()),
        (KIND_HELLO, format!("{hello}\"instance\":\"0123456789ABCDEF\"}}")),
        (KIND_HELLO, format!("{hello}\"instance\":\"0123456789abcde\"}}")),
        (KIND_HELLO, format!("{hello}\"instance\":7}}")),
        (KIND_HELLO, format!("{hello}\"started\":-1}}")),
        (KIND_HELLO, format!("{hello}\"started\":\"1\"}}")),
        (KIND_HELLO, format!("{hello}\"way\":4294967296}}")),
        (KIND_KEY_NOTICE, "{}".to_owned()),
        (KIND_KEY_NOTICE, "{\"expires\":-1}".to_owned()),
        (KIND_KEY_NOTICE, "{\"expires\":\"2027-01-01T00:00:00Z\"}".to_owned()),
    ] {
        assert!(Control::decode(&mut framed(kind, body.as_bytes())).is_err(), "{kind}: {body}");
    }
    for (kind, body, read) in [
        (KIND_DRAIN, "{\"deadline_s\":4294967295,\"why\":\"x\"}", Control::Drain(Drain { deadline_s: u32::MAX })),
        (KIND_MOVE, "{\"to\":\"elsewhere\"}", Control::Move),
        (KIND_SUPERSEDED, "{\"by\":\"x\"}", Control::Superseded),
        (KIND_KEY_NOTICE, "{\"expires\":0,\"key\":\"x\"}", Control::KeyNotice(KeyNotice { expires: 0 })),
        (KIND_EXAMINE, "{\"deep\":true}", Control::Examine),
    ] {
        assert_eq!(Control::decode(&mut framed(kind, body.as_bytes())), Ok(Some(read)));
    }
}

#[test]
fn control_refuses_what_is_too_long_or_broken() {
    for bytes in [&b"\0\0\0\x01\0"[..], b"\0\x01\0\x01", b"\xff\xff\xff\xff", b"\0\0\0\x04\0\x01{}"] {
        assert!(Control::decode(&mut BytesMut::from(bytes)).is_err(), "{bytes:?}");
    }
    assert_eq!(Control::decode(&mut BytesMut::from(&b"\0\0"[..])), Ok(None));
    assert_eq!(Control::decode(&mut BytesMut::from(&b"\0\0\0\x02\x12\x34"[..])), Ok(Some(Control::Unknown(0x1234))));
}

proptest! {
    #[test]
    fn readers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Peer::parse(&bytes);
        let _ = Originator::parse(&String::from_utf8_lossy(&bytes));
        let _ = parse_refusal(&String::from_utf8_lossy(&bytes));
        let _ = Control::decode(&mut BytesMut::from(&bytes[..]));
    }

    #[test]
    fn a_control_body_never_panics_and_is_taken_as_a_whole(
        kind in 0_u16..8,
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..300),
            "\\{\"(deadline_s|instance|started|version|expires)\":[0-9a-f\"{}-]{0,24}\\}".prop_map(String::into_bytes),
        ],
        next in 8_u16..,
    ) {
        let mut buffer = framed(kind, &body);
        buffer.extend_from_slice(&framed(next, b"later"));
        if Control::decode(&mut buffer).is_ok() {
            prop_assert_eq!(Control::decode(&mut buffer), Ok(Some(Control::Unknown(next))));
            prop_assert!(buffer.is_empty());
        }
    }

    #[test]
    fn control_messages_survive_any_split(
        deadline_s in any::<u32>(),
        unknown in 8_u16..,
        cut in 1_usize..16,
    ) {
        let messages = [
            Control::Move, Control::Drain(Drain { deadline_s }), Control::Unknown(unknown), Control::Superseded,
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(Control::encode).collect();
        let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
        for part in bytes.chunks(cut) {
            buffer.extend_from_slice(part);
            while let Some(message) = Control::decode(&mut buffer).expect("well formed") {
                read.push(message);
            }
        }
        prop_assert_eq!(&read[..], &messages[..]);
    }
}
