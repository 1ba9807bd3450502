//! What the two ends of a link say to each other: originators, refusals, credit, control messages.

use bytes::BytesMut;
use caponier::tunnel::wire::{
    CONTROL_MAX, Control, Originator, RefusalCode, credit, parse_credit, parse_refusal, refusal_text,
};

/// Every reader bounds what it takes, what it took is written back as the same, and how the bytes of a control channel are
/// cut changes nothing. The first byte says how they are cut.
pub fn holds(bytes: &[u8]) {
    if let Ok(text) = str::from_utf8(bytes) {
        originator_holds(text);
        refusal_holds(text);
    }
    if let Ok(given) = parse_credit(bytes) {
        assert_eq!(&credit(given)[..], bytes);
    }
    if let Ok(code) = bytes.try_into().map(u32::from_be_bytes)
        && let Some(known) = RefusalCode::from_wire(code)
    {
        assert_eq!(known as u32, code);
    }
    let Some((cut, said)) = bytes.split_first() else { return };
    let whole = control(said, &[u8::MAX]);
    let cut = control(said, &[*cut]);
    assert_eq!(whole, cut, "what is said depends on how it is cut");
    for message in whole.0 {
        control_holds(&message);
    }
}

fn originator_holds(text: &str) {
    match Originator::parse(text) {
        Ok(None) => assert!(!text.starts_with("caponier"), "{text:?}"),
        Ok(Some(originator)) => {
            assert_eq!(originator.to_string(), text, "one originator has one form");
            assert!(originator.client.len() <= 64 && originator.client.bytes().all(|byte| byte.is_ascii_graphic()));
            assert_eq!(originator.forward.as_str().len(), 24);
        }
        Err(_) => assert!(text.starts_with("caponier"), "{text:?}"),
    }
}

fn refusal_holds(text: &str) {
    let Some((forward, words)) = parse_refusal(text) else { return };
    assert!(text.starts_with(&format!("{forward} ")));
    assert!(super::is_printable(&words) && words.chars().count() <= 256);
    let again = refusal_text(Some(&forward), &words);
    assert_eq!(parse_refusal(&again), Some((forward, words)));
}

/// The messages of a control channel until its end or its first fault, and whether there was one.
fn control(said: &[u8], lengths: &[u8]) -> (Vec<Control>, bool) {
    let (mut buffer, mut messages) = (BytesMut::new(), Vec::new());
    for piece in super::pieces(said, lengths) {
        buffer.extend_from_slice(piece);
        loop {
            let before = buffer.len();
            match Control::decode(&mut buffer) {
                Ok(Some(message)) => {
                    assert!(buffer.len() + 6 <= before, "a message has a length and a kind");
                    messages.push(message);
                }
                Ok(None) => {
                    assert_eq!(buffer.len(), before);
                    assert!(before < CONTROL_MAX + 4, "more is waited for than a message can have");
                    break;
                }
                Err(_) => return (messages, true),
            }
        }
    }
    (messages, false)
}

fn control_holds(message: &Control) {
    if let Control::Hello(hello) = message {
        let clean = |text: &str| text.len() <= 64 && text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        assert!(clean(&hello.version) && hello.features.len() <= 64);
        assert!(hello.features.iter().all(|feature| clean(feature)));
        assert!(hello.replica.as_deref().is_none_or(clean));
        assert!(hello.instance.as_ref().is_none_or(|instance| instance.as_str().len() == 16));
    }
    let mut written = BytesMut::from(&message.encode()[..]);
    assert!(written.len() <= CONTROL_MAX + 4);
    assert_eq!(Control::decode(&mut written).as_ref(), Ok(&Some(message.clone())));
    assert!(written.is_empty());
}
