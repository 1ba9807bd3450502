//! SOCKS5 (RFC 1928) as far as we speak it: no authentication, CONNECT, names resolved at the far end.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::keeper::Cause;
use crate::target::{Target, TargetError};

/// Why there is no target.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// Not even a greeting.
    #[error("it does not speak SOCKS5")]
    Version,
    /// All of its ways to authenticate are ones that we do not have.
    #[error("it wants to authenticate, and there is nothing to authenticate with")]
    Methods,
    /// BIND or UDP ASSOCIATE, or anything else.
    #[error("it wants something else than CONNECT")]
    Command,
    /// Neither a name nor an address.
    #[error("its target is of a kind that is unknown")]
    AddressType,
    /// A name or a port that is none.
    #[error("its target is not well formed: {0}")]
    Target(TargetError),
    /// It went away.
    #[error("it went away: {0}")]
    Io(#[from] io::Error),
}

impl Fault {
    pub(super) fn reply(&self) -> Vec<u8> {
        match self {
            // To those who speak something else, nothing that could be taken for an answer.
            Self::Version | Self::Io(_) => Vec::new(),
            Self::Methods => vec![VERSION, NO_METHOD],
            Self::Command => reply(7).to_vec(),
            Self::AddressType => reply(8).to_vec(),
            Self::Target(_) => reply(1).to_vec(),
        }
    }
}

/// Reads what is wanted, up to the last byte of the request.
pub(super) async fn ask(stream: &mut TcpStream) -> Result<Target, Fault> {
    if stream.read_u8().await? != VERSION {
        return Err(Fault::Version);
    }
    let mut methods = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        return Err(Fault::Methods);
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;

    let [version, command, _reserved, kind] = array(stream).await?;
    if version != VERSION {
        return Err(Fault::Version);
    }
    let host = match kind {
        1 => Ipv4Addr::from(array::<4>(stream).await?).to_string(),
        3 => {
            let mut name = vec![0; usize::from(stream.read_u8().await?)];
            stream.read_exact(&mut name).await?;
            String::from_utf8(name).map_err(|_| Fault::Target(TargetError::Character))?
        }
        4 => Ipv6Addr::from(array::<16>(stream).await?).to_string(),
        _ => return Err(Fault::AddressType),
    };
    let port = stream.read_u16().await?;
    if command != CONNECT {
        return Err(Fault::Command);
    }
    Target::from_wire(&host, port.into()).map_err(Fault::Target)
}

async fn array<const N: usize>(stream: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// It is connected.
pub(super) const OPENED: [u8; 10] = reply(0);

/// It is not.
pub(super) fn refused(cause: Cause) -> [u8; 10] {
    reply(match cause {
        Cause::NotAllowed => 2,
        Cause::NoSession => 3,
        Cause::NotAvailable => 4,
        // "TTL expired": the one code that speaks of time.
        Cause::Timeout => 6,
        Cause::Busy => 1,
    })
}

/// A reply, which names 0.0.0.0:0 for the address at the far end: that is nobody's business here.
const fn reply(code: u8) -> [u8; 10] {
    [VERSION, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

const VERSION: u8 = 5;
const CONNECT: u8 = 1;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xFF;
