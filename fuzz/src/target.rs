//! Hosts and targets, from the wire and from files.

use std::net::{IpAddr, Ipv4Addr};

use caponier::target::{Host, Name, Target, normal};

/// A target that is read has one form, which reads back as itself from both ways in; a name is never an address in
/// disguise.
pub fn holds(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(host) = text.parse::<Host>() {
        host_holds(text, &host);
    }
    // A pattern of bits above those of a port has to be refused, not cut off.
    let port = bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_mul(257).wrapping_add(u32::from(*byte)));
    match Target::from_wire(text, port) {
        Ok(target) => {
            assert_eq!(u32::from(target.port), port, "the port that was asked for");
            assert!(target.port != 0 && text.parse::<Host>().as_ref() == Ok(&target.host));
            target_holds(&target);
        }
        Err(_) => assert!(text.parse::<Host>().is_err() || !(1..=65_535).contains(&port), "{text:?} {port}"),
    }
    if let Ok(target) = text.parse::<Target>() {
        let (host, port) = text.rsplit_once(':').expect("a port");
        assert_eq!(port.parse::<u16>(), Ok(target.port), "{text:?}");
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        assert_eq!(bare.parse::<Host>().as_ref(), Ok(&target.host), "both ways in agree on {text:?}");
        target_holds(&target);
    }
}

fn target_holds(target: &Target) {
    let written = target.to_string();
    assert_eq!(written.parse::<Target>().as_ref(), Ok(target), "{written}");
    assert_eq!(Target::from_wire(&target.host.to_string(), target.port.into()).as_ref(), Ok(target), "{written}");
}

fn host_holds(text: &str, host: &Host) {
    let written = host.to_string();
    assert_eq!(written.parse::<Host>().as_ref(), Ok(host), "{text:?} reads back as another host");
    assert!(written.bytes().all(|byte| byte.is_ascii_graphic()) && written == written.to_ascii_lowercase());
    match host {
        Host::Address(address) => {
            assert_eq!(normal(*address), *address, "{text:?} has another form");
            let standard = text.parse::<IpAddr>().expect("an address to the standard library as well");
            assert_eq!(standard.to_canonical(), *address, "{text:?}");
            // Whatever a C library makes of it is the same address.
            if let Some(number) = inet_aton(text) {
                assert_eq!(IpAddr::V4(Ipv4Addr::from(number)), *address, "{text:?}");
            }
        }
        Host::Name(name) => {
            assert!(text.parse::<IpAddr>().is_err(), "{text:?} is an address");
            assert_eq!(inet_aton(text), None, "{text:?} is an address to a C library");
            assert_eq!(inet_aton(name.as_str()), None, "{text:?}, written {name}, is an address to a C library");
            name_holds(text, name);
        }
    }
}

fn name_holds(text: &str, name: &Name) {
    let written = name.as_str();
    assert!((1..=253).contains(&written.len()), "{text:?}");
    assert_eq!(text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase(), written, "nothing is left out or added");
    for label in written.split('.') {
        assert!((1..=63).contains(&label.len()), "{text:?}");
        assert!(!label.starts_with('-') && !label.ends_with('-'), "{text:?}");
        assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_'));
    }
}

/// What `inet_aton` of the C library reads: one to four numbers, decimal, octal or hexadecimal, the last of which fills what
/// is left. It takes an empty number after `0x`, as some implementations do, and nothing after a white space counts.
fn inet_aton(text: &str) -> Option<u32> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let parts = text.split('.').map(number).collect::<Option<Vec<_>>>()?;
    let (last, first) = parts.split_last()?;
    if first.len() > 3 || first.iter().any(|part| *part > 255) || *last >> (8 * (4 - first.len())) != 0 {
        return None;
    }
    let high = first.iter().enumerate().fold(0, |sum, (at, part)| sum | part << (24 - 8 * at));
    u32::try_from(high | last).ok()
}

fn number(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    match (lower.strip_prefix("0x"), lower.strip_prefix('0')) {
        (Some(""), _) | (None, Some("")) => Some(0),
        (Some(digits), _) => u64::from_str_radix(digits, 16).ok(),
        (None, Some(digits)) => u64::from_str_radix(digits, 8).ok(),
        (None, None) => lower.bytes().all(|byte| byte.is_ascii_digit()).then(|| lower.parse().ok())?,
    }
}
