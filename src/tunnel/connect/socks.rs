//! Asking a SOCKS5 proxy for a connection (RFC 1928), with a user name and password if it wants them (RFC 1929).
//!
//! Promised: names are sent as they are, for the proxy to look up; each reply is read to its end and not a byte further, so
//! what the other end says first stays in the stream; the credentials are told to nobody else.

use std::io;
use std::net::IpAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::proxy::Credentials;
use crate::secret::Secret;
use crate::target::{Host, Target};

/// Why a SOCKS5 proxy made no connection, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum SocksError {
    /// It broke off.
    #[error("it closed the connection, or it failed, {0}")]
    Broke(&'static str, #[source] io::Error),
    /// Another protocol.
    #[error("it answered {0} with something that is not SOCKS5{hint}; is it a SOCKS5 proxy?", hint = hint(*.1))]
    NotSocks(&'static str, u8),
    /// It wants something else than we can do.
    #[error("{}", match sent {
        true => "it takes neither a user name with a password nor nobody at all, and nothing else is spoken here: ask its operators \
                 for one of the two",
        false => "it asks for credentials, and none are configured",
    })]
    Method {
        /// Whether there were credentials to offer.
        sent: bool,
    },
    /// The credentials.
    #[error("it did not accept the credentials given; check them")]
    Authentication,
    /// It said no.
    #[error("it refused the connection with code {code:#04x}: {}", meaning(*code))]
    Refused {
        /// Its reply code.
        code: u8,
    },
}

/// Asks for a connection to `to`.
///
/// # Errors
/// If the proxy makes none.
pub(super) async fn ask<S>(stream: &mut S, to: &Target, credentials: Option<&Credentials>) -> Result<(), SocksError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let greeting: &[u8] = match credentials {
        Some(_) => &[VERSION, 2, NOBODY, PASSWORD],
        None => &[VERSION, 1, NOBODY],
    };
    let [version, method] = exchange(stream, greeting, "while it chose how we log in").await?;
    if version != VERSION {
        return Err(SocksError::NotSocks("our greeting", version));
    }
    match (method, credentials) {
        (NOBODY, _) => {}
        (PASSWORD, Some(credentials)) => {
            let (user, password) = credentials.pair();
            let mut login = Vec::with_capacity(3 + user.len() + password.len());
            login.push(LOGIN_VERSION);
            for text in [user, password] {
                // `Proxy::with` has looked at their lengths.
                login.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
                login.extend_from_slice(text.as_bytes());
            }
            let login = Secret::new(login);
            let [_, status] = exchange(stream, login.expose(), "while it looked at the credentials").await?;
            if status != 0 {
                return Err(SocksError::Authentication);
            }
        }
        _ => return Err(SocksError::Method { sent: credentials.is_some() }),
    }

    let [version, code, _, kind] = exchange(stream, &request(to), WHILE_CONNECTING).await?;
    if version != VERSION {
        return Err(SocksError::NotSocks("our request", version));
    }
    if code != 0 {
        return Err(SocksError::Refused { code });
    }
    // From where it connects, which is of no use to us but has to be read.
    let length = match kind {
        ADDRESS_4 => 4,
        ADDRESS_6 => 16,
        NAME => usize::from(read::<1, _>(stream, WHILE_CONNECTING).await?[0]),
        other => return Err(SocksError::NotSocks("our request", other)),
    };
    let mut bound = [0; 255 + 2];
    let bound = &mut bound[..length + 2];
    stream.read_exact(bound).await.map_err(|error| SocksError::Broke(WHILE_CONNECTING, error))?;
    Ok(())
}

fn request(to: &Target) -> Vec<u8> {
    let mut request = vec![VERSION, CONNECT, 0];
    match &to.host {
        Host::Address(IpAddr::V4(address)) => {
            request.push(ADDRESS_4);
            request.extend_from_slice(&address.octets());
        }
        Host::Address(IpAddr::V6(address)) => {
            request.push(ADDRESS_6);
            request.extend_from_slice(&address.octets());
        }
        Host::Name(name) => {
            // A name has at most 253 bytes.
            request.extend_from_slice(&[NAME, u8::try_from(name.as_str().len()).unwrap_or(u8::MAX)]);
            request.extend_from_slice(name.as_str().as_bytes());
        }
    }
    request.extend_from_slice(&to.port.to_be_bytes());
    request
}

async fn exchange<const N: usize, S>(stream: &mut S, say: &[u8], during: &'static str) -> Result<[u8; N], SocksError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let broke = |error| SocksError::Broke(during, error);
    stream.write_all(say).await.map_err(broke)?;
    stream.flush().await.map_err(broke)?;
    read(stream, during).await
}

/// Reads so many bytes and no more.
async fn read<const N: usize, S>(stream: &mut S, during: &'static str) -> Result<[u8; N], SocksError>
where
    S: AsyncRead + Unpin,
{
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.map_err(|error| SocksError::Broke(during, error))?;
    Ok(bytes)
}

/// What the first byte of another protocol says of the peer.
fn hint(first: u8) -> &'static str {
    match first {
        b'H' => " but looks like HTTP",
        b'S' => " but looks like SSH",
        0x15 => " but looks like TLS",
        0x00 => " but looks like SOCKS4",
        _ => "",
    }
}

/// The reply codes of RFC 1928 §6.
fn meaning(code: u8) -> &'static str {
    match code {
        0x01 => "something failed at the proxy; ask its operators, who can find this request in its log",
        0x02 => "its rules do not allow it; ask its operators to permit this host and port",
        0x03 => "the network is not reachable from there; ask its operators whether the proxy has a route to it",
        0x04 => {
            "the host is not reachable from there, or its name is not known there; ask its operators whether the proxy can resolve \
             and reach it"
        }
        0x05 => "the host refused it; ask its operators whether a firewall lets the proxy reach this host and port",
        0x06 => {
            "it took too long to get there; ask its operators whether a firewall lets the proxy reach this host and port"
        }
        0x07 => "it does not make connections for its clients",
        0x08 => "it does not take this kind of address; write the gateway by its name, or by its address",
        _ => "the standard does not know this code; ask its operators",
    }
}

const VERSION: u8 = 5;
const NOBODY: u8 = 0;
const PASSWORD: u8 = 2;
const LOGIN_VERSION: u8 = 1;
const CONNECT: u8 = 1;
const ADDRESS_4: u8 = 1;
const NAME: u8 = 3;
const ADDRESS_6: u8 = 4;
const WHILE_CONNECTING: &str = "before it said whether it has connected";

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;
    use crate::chain::Chain;
    use crate::task::Tasks;

    /// Asks a proxy that says one of `replies` after each of our messages, and closes after the last.
    async fn asked(
        to: &str,
        replies: &[&[u8]],
        credentials: Option<&Credentials>,
    ) -> (Result<Vec<u8>, SocksError>, Vec<Vec<u8>>) {
        let (mut ours, mut theirs) = duplex(64 * 1024);
        let replies: Vec<Vec<u8>> = replies.iter().map(|reply| reply.to_vec()).collect();
        let proxy = Tasks::new().spawn(async move {
            let mut heard = Vec::new();
            for reply in replies {
                let mut message = vec![0; 1024];
                let read = theirs.read(&mut message).await.expect("read");
                message.truncate(read);
                heard.push(message);
                if theirs.write_all(&reply).await.is_err() {
                    break;
                }
            }
            heard
        });
        let answer = ask(&mut ours, &to.parse().expect(to), credentials).await;
        let answer = match answer {
            Ok(()) => {
                let mut rest = Vec::new();
                ours.read_to_end(&mut rest).await.expect("read");
                Ok(rest)
            }
            Err(error) => Err(error),
        };
        drop(ours);
        (answer, proxy.await.expect("served"))
    }

    fn credentials() -> Credentials {
        Credentials::from_line("user:open sesame").expect("credentials")
    }

    #[tokio::test]
    async fn asks_as_the_standard_says_and_keeps_what_follows() {
        let bound: [(&[u8], &str); 3] = [
            (b"\x05\x00\x00\x01\x0a\x00\x00\x01\x01\xbbSSH-2.0-x\r\n", "an IPv4 address"),
            (b"\x05\x00\x00\x03\x04here\x01\xbbSSH-2.0-x\r\n", "a name"),
            (b"\x05\x00\x00\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\x01\xbbSSH-2.0-x\r\n", "an IPv6 address"),
        ];
        for (reply, kind) in bound {
            for (to, request) in [
                ("gw.example:443", &b"\x05\x01\x00\x03\x0agw.example\x01\xbb"[..]),
                ("10.0.0.7:22", b"\x05\x01\x00\x01\x0a\x00\x00\x07\x00\x16"),
                ("[2001:db8::7]:22", b"\x05\x01\x00\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07\x00\x16"),
            ] {
                let (answer, heard) = asked(to, &[b"\x05\x00", reply], None).await;
                assert_eq!(answer.expect(kind), b"SSH-2.0-x\r\n");
                assert_eq!(heard, [b"\x05\x01\x00", request]);
            }
        }
        let (answer, heard) = asked("10.0.0.7:22", &[b"\x05\x02", b"\x01\x00", bound[0].0], Some(&credentials())).await;
        assert_eq!(answer.expect("connected"), b"SSH-2.0-x\r\n");
        assert_eq!(heard[..2], [&b"\x05\x02\x00\x02"[..], b"\x01\x04user\x0bopen sesame"]);
        // What need not be shown is not.
        let (answer, heard) = asked("10.0.0.7:22", &[b"\x05\x00", bound[0].0], Some(&credentials())).await;
        assert_eq!(answer.expect("connected"), b"SSH-2.0-x\r\n");
        assert_eq!(heard.len(), 2);
    }

    #[tokio::test]
    async fn refusals_say_what_to_do_and_never_the_password() {
        let basic = credentials();
        let code = |code: u8| vec![5, code, 0, 1, 0, 0, 0, 0, 0, 0];
        let codes: Vec<_> = (1..=9).map(code).collect();
        let mut cases: Vec<(Vec<&[u8]>, bool, &str)> = vec![
            (vec![b"\x05\xff"], false, "it asks for credentials, and none are configured"),
            (vec![b"\x05\x02"], false, "it asks for credentials, and none are configured"),
            (vec![b"\x05\xff"], true, "it takes neither a user name with a password nor nobody at all"),
            (vec![b"\x05\x01"], true, "it takes neither a user name"),
            (vec![b"\x05\x02", b"\x01\x01"], true, "it did not accept the credentials given"),
            (vec![b"\x05\x02", b"\x01"], true, "while it looked at the credentials"),
            (vec![b"HTTP/1.1 400 Bad Request\r\n\r\n"], false, "not SOCKS5 but looks like HTTP"),
            (vec![b"SSH-2.0-x\r\n"], false, "not SOCKS5 but looks like SSH"),
            (vec![b"\x00\x5b\0\0\0\0\0\0"], false, "not SOCKS5 but looks like SOCKS4"),
            (vec![b""], false, "while it chose how we log in"),
            (vec![b"\x05\x00", b"\x05\x00\x00\x01\x0a"], false, "before it said whether it has connected"),
            (vec![b"\x05\x00", b"\x05\x00\x00\x07\x0a\0\0\0\0\0"], false, "not SOCKS5"),
            (vec![b"\x05\x00", b"\x04\x00\x00\x01\x0a\0\0\0\0\0"], false, "not SOCKS5"),
        ];
        let meanings = [
            "code 0x01: something failed at the proxy",
            "code 0x02: its rules do not allow it; ask its operators to permit",
            "code 0x03: the network is not reachable",
            "code 0x04: the host is not reachable from there, or its name",
            "code 0x05: the host refused it",
            "code 0x06: it took too long",
            "code 0x07: it does not make connections",
            "code 0x08: it does not take this kind of address",
            "code 0x09: the standard does not know this code",
        ];
        cases.extend(codes.iter().zip(meanings).map(|(code, says)| (vec![&b"\x05\x00"[..], code], false, says)));
        for (replies, sent, says) in cases {
            let (answer, _) = asked("gw.example:443", &replies, sent.then_some(&basic)).await;
            let error = answer.expect_err(says);
            let text = format!("{} {error:?}", Chain(&error));
            assert!(text.contains(says), "{text} | {says}");
            assert!(!text.contains("sesame"), "{text}");
        }
    }
}
