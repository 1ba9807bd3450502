//! Heads of HTTP requests.

use caponier::limits;
use caponier::tunnel::http::parse;

/// A head ends where its first empty line does, and is the same whatever follows; what is refused stays so; and a head that
/// is taken reads the same in the most careless way of reading it.
pub fn holds(bytes: &[u8]) {
    let whole = parse(bytes);
    if let Err(error) = &whole {
        assert!(super::is_printable(&error.to_string()));
        let reply = error.reply().text();
        assert!(reply.starts_with("HTTP/1.1 4"), "{reply}");
    }
    // No head before its last byte, and nothing else after an error.
    let mut refused = false;
    let ends = bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    let step = (bytes.len() / 64).max(1);
    for length in (0..bytes.len()).step_by(step) {
        match parse(&bytes[..length]) {
            Ok(None) => assert!(!refused && ends.is_none_or(|end| length < end)),
            Ok(Some((_, end))) => assert!(!refused && Some(end) == ends && end <= length),
            Err(_) => refused = true,
        }
    }
    assert!(!refused || whole.is_err(), "refused at first, and then taken");
    let Ok(Some((head, end))) = whole else {
        assert!(bytes.len() < limits::HTTP_HEAD_MAX || parse(bytes).is_err(), "a head that never ends");
        return;
    };
    assert!(end <= limits::HTTP_HEAD_MAX && Some(end) == ends, "it ends at {end}, its empty line at {ends:?}");
    let shown = format!("{head:?}");
    assert!(!head.all("proxy-authorization").any(|value| value.len() > 24 && shown.contains(value)), "{shown}");
    careless(&head, &bytes[..end]);
}

/// As a reader would see it that takes CR, LF and blanks as they come.
fn careless(head: &caponier::tunnel::http::Head, bytes: &[u8]) {
    assert!(!bytes.iter().any(|byte| matches!(byte, 0..=8 | 11 | 12 | 14..=31 | 127)), "a control character");
    let text = String::from_utf8_lossy(bytes).into_owned();
    let mut lines = text.split(['\r', '\n']).filter(|line| !line.is_empty());
    let words: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(words[..2], [head.method(), head.target()]);
    assert!(words.len() == 3 && (words[2] == "HTTP/1.1" || words[2] == "HTTP/1.0"), "{words:?}");
    let (mut hosts, mut count) = (0, 0);
    for line in lines {
        count += 1;
        assert!(!line.starts_with([' ', '\t']), "a line that goes on");
        let (name, value) = line.split_once(':').expect("a header");
        let name = name.trim().to_ascii_lowercase().replace('_', "-");
        match name.as_str() {
            "host" => hosts += 1,
            "content-length" => assert_eq!(value.trim(), "0", "a body"),
            "transfer-encoding" => panic!("a body in chunks"),
            _ => {}
        }
    }
    assert!(count <= limits::HTTP_HEADERS_MAX);
    assert!(hosts == 1 || (hosts == 0 && words[2] == "HTTP/1.0"), "{hosts} hosts");
    match head.method() {
        "CONNECT" => assert!(!head.target().contains(['/', '@']), "{}", head.target()),
        _ => assert!(head.target().starts_with('/'), "{}", head.target()),
    }
}
