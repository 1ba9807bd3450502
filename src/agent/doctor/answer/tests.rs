//! Tests of the module above.

use std::time::Duration;

use jiff::SignedDuration;
use tokio::io::AsyncRead;
use tokio::net::TcpListener;

use super::*;
use crate::identity::Fingerprint;

fn target(text: &str) -> Target {
    text.parse().expect("a target")
}

/// A certificate for `names` that counts from so many hours from now on, and until so many.
fn shown(names: &[&str], hours: (i64, i64), fits: bool) -> Shown {
    let now = Timestamp::now();
    Shown {
        subject: "CN=db".to_owned(),
        issuer: "CN=authority".to_owned(),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        begins: now + SignedDuration::from_hours(hours.0),
        ends: now + SignedDuration::from_hours(hours.1),
        fingerprint: Fingerprint::of(b"certificate"),
        fits,
    }
}

/// How bad it is, the word for it, and what is said.
fn read(answer: Answer) -> (&'static str, &'static str, String) {
    match answer {
        Answer::Nothing => ("nothing", "", String::new()),
        Answer::Said(said) => ("said", "", said),
        Answer::Odd { word, said, .. } => ("odd", word, said),
        Answer::Bad { word, said, .. } => ("bad", word, said),
    }
}

#[test]
fn a_certificate_that_clients_refuse_is_bad_and_the_worst_is_said() {
    let (name, address) = (target("db.internal:5432"), target("10.0.0.1:5432"));
    let year = (-24, 365 * 24);
    for (at, shown, kind, word, part) in [
        (&name, shown(&["db.internal"], (-48, -24), true), "bad", "certificate_expired", "has expired at"),
        (&name, shown(&["other"], (-48, -24), false), "bad", "certificate_expired", "has expired at"),
        (&name, shown(&["db.internal"], (24, 48), true), "bad", "certificate_not_yet_valid", "counts only from"),
        (&name, shown(&["a", "b"], year, false), "bad", "certificate_name", "for a, b, and not for db.internal"),
        (&name, shown(&[], year, false), "bad", "certificate_name", "for nobody, and not for db.internal"),
        // Clients may know it by a name.
        (&address, shown(&["db.internal"], year, false), "odd", "certificate_name", "and not for 10.0.0.1"),
        (&name, shown(&["db.internal"], (-24, 24), true), "odd", "certificate_ends_soon", "good until"),
        (&name, shown(&["db.internal"], year, true), "said", "", "answers as TLS, subject CN=db"),
    ] {
        let (is, its, said) = read(judge(at, &shown, "TLS"));
        assert_eq!((is, its), (kind, word), "{at}: {said}");
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn a_greeting_is_taken_for_what_it_is_and_disturbs_no_terminal() {
    let mysql = |version: &[u8]| [&[74, 0, 0, 0, 10][..], version, b"\0rest"].concat();
    let long = [b'8'; 1000];
    for (greeting, kind, said) in [
        (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "said", "answers as an SSH server (SSH-2.0-OpenSSH_9.2)".to_owned()),
        (b"SSH-2.0-\x1b[2Jx\r\n".to_vec(), "said", "answers as an SSH server (SSH-2.0-)".to_owned()),
        (mysql(b"8.0.36"), "said", "answers as MySQL (8.0.36)".to_owned()),
        (mysql(b"8.0\x1b[2J"), "said", "answers as MySQL (8.0)".to_owned()),
        (mysql(&long), "said", format!("answers as MySQL ({})", "8".repeat(64))),
        (mysql(b""), "said", "answers as MySQL ()".to_owned()),
        (b"\x10\0\0\xff\x6a\x04Host is blocked".to_vec(), "said", "answers, and speaks first".to_owned()),
        (
            b"\x10\0\0\0\xff\x6a\x04Host is blocked".to_vec(),
            "bad",
            "MySQL answers with an error in the place of a greeting".to_owned(),
        ),
        (b"220 mail ESMTP\r\n".to_vec(), "said", "answers, and speaks first".to_owned()),
        (vec![0], "said", "answers, and speaks first".to_owned()),
    ] {
        let (is, _, its) = read(greeted(&greeting));
        assert_eq!((is, its), (kind, said), "{greeting:?}");
    }
}

/// What is made of a target that reads until it has what is sent to a database first, says `reply`, and hangs up.
async fn asked(probe: Probe, reply: &'static [u8]) -> (&'static str, &'static str, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let answering = async {
        let (mut stream, _) = listener.accept().await.expect("accepted");
        drain(&mut stream, SSL_REQUEST.len()).await;
        stream.write_all(reply).await.expect("written");
        // In order, so that what was written arrives.
        stream.shutdown().await.expect("ended");
        drain(&mut stream, usize::MAX).await;
    };
    let stream = TcpStream::connect(address).await.expect("connected");
    let counters = Counters::default();
    let target = target(&address.to_string());
    let asking = async { ask(probe, &target, stream, &counters).await };
    let both = async { tokio::join!(asking, answering).0 };
    read(timeout(Duration::from_secs(120), both).await.expect("an answer in time"))
}

async fn drain(stream: &mut (impl AsyncRead + Unpin), least: usize) {
    let mut read = 0;
    while read < least {
        match stream.read(&mut [0; 1024]).await {
            Ok(0) | Err(_) => return,
            Ok(more) => read += more,
        }
    }
}

#[tokio::test]
async fn what_answers_otherwise_than_it_should_is_not_taken_for_it() {
    let (plain, broken, silent, wild, tls, last) = tokio::join!(
        asked(Probe::Postgres, b"N"),
        asked(Probe::Postgres, b"Sno TLS at all\r\n"),
        asked(Probe::Postgres, b""),
        asked(Probe::Postgres, b"E"),
        asked(Probe::Tls, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        asked(Probe::Last, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    );
    assert_eq!(plain, ("said", "", "answers as PostgreSQL, without TLS".to_owned()));
    assert_eq!((broken.0, broken.1), ("bad", "tls"), "{}", broken.2);
    assert!(broken.2.starts_with("PostgreSQL offers TLS, and does not make it: "), "{}", broken.2);
    assert_eq!(silent.0, "nothing");
    assert_eq!(wild.0, "nothing");
    assert_eq!((tls.0, tls.1), ("bad", "tls"), "{}", tls.2);
    assert!(tls.2.starts_with("it does not speak TLS: "), "{}", tls.2);
    // It need not be what it was tried for.
    assert_eq!(last.0, "nothing");
}

#[test]
fn every_port_is_asked_for_something_and_an_unknown_one_for_all_that_there_is() {
    assert_eq!(probes(&target("db:5432")), [Probe::Postgres]);
    assert_eq!(probes(&target("db:3306")), [Probe::Greeting]);
    assert_eq!(probes(&target("api:6443")), [Probe::Tls]);
    assert_eq!(probes(&target("x:1")), [Probe::Postgres, Probe::Last]);
}
