//! What a target says of itself: PostgreSQL and MySQL, whatever speaks TLS, whatever speaks first; else that TCP answers.
//!
//! Promised: nothing is sent but what any client sends before it logs in: the beginning of TLS, or PostgreSQL's question for
//! it. At a port that is known for nothing, first the target's own greeting is waited for, then PostgreSQL's question is put,
//! and over a connection of its own the beginning of TLS. What comes is bounded in bytes, and in time by the caller.
//!
//! A certificate is judged by its name and its time alone: whom a target's clients trust is not the agent's to know.

use jiff::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::audit::Counters;
use crate::chain::Chain;
use crate::limits;
use crate::registry::expiry::{Left, Stage};
use crate::target::{Host, Target};
use crate::tls::{self, Shown};

/// What is tried over one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Probe {
    /// A greeting is waited for, then PostgreSQL's question is put.
    Postgres,
    /// A greeting is waited for.
    Greeting,
    /// TLS, where it is expected.
    Tls,
    /// TLS, where nothing is.
    Last,
}

/// What came of it.
pub(super) enum Answer {
    /// Nothing that says what it is.
    Nothing,
    /// All is well.
    Said(String),
    /// It works, not for long or not for everybody.
    Odd { word: &'static str, said: String, next: String },
    /// Who means to use it cannot.
    Bad { word: &'static str, said: String, next: String },
}

/// What to try, by the port.
pub(super) fn probes(target: &Target) -> Vec<Probe> {
    match target.port {
        5432..=5439 | 6432 => vec![Probe::Postgres],
        22 | 3306..=3309 | 33060 => vec![Probe::Greeting],
        443 | 636 | 2376 | 2379 | 6443 | 8443 | 9200 | 9443 | 10250 => vec![Probe::Tls],
        _ => vec![Probe::Postgres, Probe::Last],
    }
}

pub(super) async fn ask(probe: Probe, target: &Target, mut stream: TcpStream, counters: &Counters) -> Answer {
    match probe {
        Probe::Tls => secured(target, stream, "TLS").await.unwrap_or_else(|error| Answer::Bad {
            word: "tls",
            said: format!("it does not speak TLS: {error}"),
            next: format!("see that what answers at {target} is what the rule means"),
        }),
        // Not known for it, and it need not be.
        Probe::Last => secured(target, stream, "TLS").await.unwrap_or(Answer::Nothing),
        Probe::Greeting => match greeting(&mut stream, counters).await {
            Some(greeting) => greeted(&greeting),
            None => Answer::Said("TCP answers".to_owned()),
        },
        Probe::Postgres => {
            if let Some(greeting) = greeting(&mut stream, counters).await {
                return greeted(&greeting);
            }
            let mut reply = [0];
            counters.add_to_target(SSL_REQUEST.len() as u64);
            let asked = async {
                stream.write_all(&SSL_REQUEST).await?;
                stream.read_exact(&mut reply).await
            };
            if timeout(limits::EXAMINED_TARGET, asked).await.is_ok_and(|asked| asked.is_ok()) {
                counters.add_from_target(1);
            }
            match reply[0] {
                b'S' => secured(target, stream, "PostgreSQL over TLS").await.unwrap_or_else(|error| Answer::Bad {
                    word: "tls",
                    said: format!("PostgreSQL offers TLS, and does not make it: {error}"),
                    next: "ask the database's operators to look at its log".to_owned(),
                }),
                b'N' => Answer::Said("answers as PostgreSQL, without TLS".to_owned()),
                _ => Answer::Nothing,
            }
        }
    }
}

/// PostgreSQL's SSLRequest: its length, and the code in the place of a version.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// What a target says first, if it does.
async fn greeting(stream: &mut TcpStream, counters: &Counters) -> Option<Vec<u8>> {
    let mut greeting = vec![0; limits::GREETING_MAX];
    let read = timeout(limits::GREETING_PATIENCE, stream.read(&mut greeting)).await.ok()?.ok()?;
    counters.add_from_target(read as u64);
    greeting.truncate(read);
    (read > 0).then_some(greeting)
}

fn greeted(greeting: &[u8]) -> Answer {
    if greeting.starts_with(b"SSH-") {
        let line: String =
            greeting.iter().take_while(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect();
        return Answer::Said(format!("answers as an SSH server ({line})"));
    }
    // A packet of MySQL: its length in three bytes, number 0, then the protocol's version 10, or an error.
    match greeting {
        [_, _, 0, 0, 10, rest @ ..] => {
            let version = rest.iter().take_while(|byte| byte.is_ascii_graphic()).take(64);
            let version: String = version.map(|byte| char::from(*byte)).collect();
            Answer::Said(format!("answers as MySQL ({version})"))
        }
        [_, _, 0, 0, 0xff, ..] => Answer::Bad {
            word: "refused",
            said: "MySQL answers with an error in the place of a greeting".to_owned(),
            next: "ask the database's operators whether this agent's host is blocked or may not connect".to_owned(),
        },
        _ => Answer::Said("answers, and speaks first".to_owned()),
    }
}

/// Looks at who answers TLS there.
async fn secured(target: &Target, stream: TcpStream, what: &str) -> Result<Answer, String> {
    let looked = tls::look(&[], &target.host, stream).await.map_err(|error| Chain(&error).to_string())?;
    match looked {
        // Whoever asks for a client's certificate may hang up; what it has shown counts.
        (_, Some(shown)) => Ok(judge(target, &shown, what)),
        (Err(error), None) => Err(Chain(&error).to_string()),
        (Ok(_), None) => Err("its certificate cannot be read".to_owned()),
    }
}

fn judge(target: &Target, shown: &Shown, what: &str) -> Answer {
    let now = Timestamp::now();
    let said = format!("answers as {what}, {shown}, good until {}", shown.ends);
    if shown.ends <= now {
        let said = format!("answers as {what} with a certificate that has expired at {} ({shown})", shown.ends);
        let next = format!("ask the operators of {target} to renew its certificate; clients that verify refuse it");
        return Answer::Bad { word: "certificate_expired", said, next };
    }
    if shown.begins > now {
        let said = format!("answers as {what} with a certificate that counts only from {} on ({shown})", shown.begins);
        let next = "see that this host's clock is right; if it is, ask its operators about the certificate".to_owned();
        return Answer::Bad { word: "certificate_not_yet_valid", said, next };
    }
    if !shown.fits {
        let names = if shown.names.is_empty() { "nobody".to_owned() } else { shown.names.join(", ") };
        let said = format!("answers as {what} with a certificate for {names}, and not for {} ({shown})", target.host);
        let next = format!(
            "ask the operators of {target} for a certificate with that name, or write the rule with a name that stands in it: \
             clients that verify (sslmode=verify-full) refuse it otherwise"
        );
        // Clients may know it by a name that the rule does not have.
        return match target.host {
            Host::Address(_) => Answer::Odd { word: "certificate_name", said, next },
            Host::Name(_) => Answer::Bad { word: "certificate_name", said, next },
        };
    }
    match ending(shown, now) {
        Some(left) => Answer::Odd {
            word: "certificate_ends_soon",
            said: format!("{said}; it {left}"),
            next: format!("ask the operators of {target} to renew its certificate"),
        },
        None => Answer::Said(said),
    }
}

/// How long a certificate has left, where that is worth a word.
pub(super) fn ending(shown: &Shown, now: Timestamp) -> Option<String> {
    Stage::of(shown.ends, now).map(|_| Left { expires: shown.ends, now }.to_string())
}

#[cfg(test)]
mod tests;
