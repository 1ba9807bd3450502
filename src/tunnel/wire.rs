//! What our ends say to each other inside of SSH: identification strings, originators, refusals, control messages.
//!
//! Promised: pure functions on bytes, no I/O; every reader bounds what it takes; tests freeze the bytes, so that a
//! change of the wire is a decision. The formats are those of the incompatible major version [`MAJOR`].
//!
//! **Originator.** Where our gateway opens a `direct-tcpip` channel (RFC 4254 §7.2) at an agent, the field
//! `originator address` holds `caponier1:FORWARD:PRINCIPAL:CLIENT`: the gateway's forward id, the principal it speaks for,
//! and the address of the principal's client, which may itself contain colons. Stock clients put an address there, which
//! never begins with `caponier`.
//!
//! **Refusal.** The agent refuses with reason code `0xFE0000xx` and a description that begins with the gateway's forward
//! id and a space, so that refusals of concurrent opens cannot be mixed up.
//!
//! **Control.** On the control channel each message is a length (u32, big endian, of what follows), a kind (u16) and a body,
//! which is JSON where there is one. Unknown kinds and unknown fields are skipped, so that an end of a later version may say
//! more: features are announced in `hello`. After `hello`, `drain` may come from either end, `move`, `superseded` and
//! `key notice` from the gateway, and `examine` from a gateway whose agent has announced [`DOCTOR`], which answers `examined`. To an end
//! that has announced [`ANCHORS`], `anchor` and `anchored` may come from either.
//! In the place of an agent's `hello`, `examine` says that no link is wanted. What each asks for is said at [`Control`].

use std::fmt;
use std::str::FromStr;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::audit::chain::TrailId;
use crate::audit::head::{Anchor, SIGNATURE_TEXT_MAX, Seal};
use crate::diagnosis::Report;
use crate::identity::{AgentName, Fingerprint, PrincipalId, ReplicaId};
use crate::secret;

/// The incompatible major version of the wire.
pub const MAJOR: u32 = 1;

/// What the door sends as its identification, without the line end.
pub const DOOR_LINE: &str = "SSH-2.0-caponier_1";

/// What our own clients send: the gateway to an agent, `caponier forward` to the door.
pub const CLIENT_LINE: &str = "SSH-2.0-caponier_1 client";

/// The subsystem of the control channel.
pub const CONTROL_SUBSYSTEM: &str = "control@caponier";

/// The feature of credit: see the flow control of channels in [`crate::tunnel::ssh`]. Every end of this major version has it.
pub const CREDIT: &str = "credit";

/// The feature of anchors: an end that has it takes heads of the other's trail, and answers.
pub const ANCHORS: &str = "anchors";

/// The feature of being examined over the link: an agent whose owner has chosen so has it.
pub const DOCTOR: &str = "doctor";

/// The type of extended data (RFC 4254 §5.2) that carries credit on a channel, also after EOF. The RFC leaves types from
/// 0xFE000000 on to private use.
pub const CREDIT_TYPE: u32 = 0xFE00_0001;

/// See [`credit`].
pub const NO_CREDIT: usize = 0;

/// What each end may send on a channel before the other has given it more: the sum of its messages' [costs](message_cost).
pub const CREDIT_INITIAL: usize = 16 * 1024;

/// What a message of `bytes` costs: more than its bytes, so that credit bounds the number of messages too.
#[must_use]
pub const fn message_cost(bytes: usize) -> usize {
    bytes + 64
}

/// The extended data that gives a peer `credit`: u32, big endian. None at all ([`NO_CREDIT`]) is what a sender says that has
/// bytes to send and no credit left for them.
#[must_use]
pub fn credit(credit: usize) -> Bytes {
    Bytes::copy_from_slice(&u32::try_from(credit).unwrap_or(u32::MAX).to_be_bytes())
}

/// Reads what [`credit`] writes.
///
/// # Errors
/// If it is not four bytes.
pub fn parse_credit(data: &[u8]) -> Result<usize, MalformedError> {
    let bytes: [u8; 4] = data.try_into().map_err(|_| MalformedError("credit"))?;
    Ok(usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX))
}

/// The largest control message, in bytes after the length field.
pub const CONTROL_MAX: usize = 64 * 1024;

/// Who sent an identification string (RFC 4253 §4.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// An agent of ours.
    Agent {
        /// Which agent it claims to be; its host key decides.
        name: AgentName,
        /// Which of its processes.
        replica: Option<ReplicaId>,
    },
    /// A client of ours.
    Client,
    /// A gateway's door.
    Door,
    /// Any other SSH implementation.
    Stock,
}

/// Why a line is no identification that we go on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentificationError {
    /// Not SSH at all.
    #[error("the peer does not speak SSH; it said {0:?}")]
    NotSsh(String),
    /// Another protocol version of SSH.
    #[error("the peer speaks another version of SSH than 2.0")]
    SshVersion,
    /// Over the length of RFC 4253 §4.2.
    #[error("the identification string is longer than 255 bytes")]
    TooLong,
    /// Control or non-ASCII characters.
    #[error("the identification string holds a character that is not printable ASCII")]
    Character,
    /// Ours, but of another major version.
    #[error(
        "the peer speaks version {0} of caponier's protocol and this end version {MAJOR}: upgrade the older of the two"
    )]
    Major(u32),
    /// Ours, but not as it should be.
    #[error("the peer's identification string is not one of caponier's")]
    Malformed,
}

impl Peer {
    /// Reads an identification string without its line end.
    ///
    /// # Errors
    /// If it is not SSH 2.0, not printable, too long, or claims to be ours and is not.
    pub fn parse(line: &[u8]) -> Result<Self, IdentificationError> {
        if line.len() > 253 {
            return Err(IdentificationError::TooLong);
        }
        if !line.starts_with(b"SSH-") {
            let start: String = line.iter().take(60).flat_map(|byte| byte.escape_ascii()).map(char::from).collect();
            return Err(IdentificationError::NotSsh(start));
        }
        if !line.iter().all(|byte| (0x20..0x7f).contains(byte)) {
            return Err(IdentificationError::Character);
        }
        let line = std::str::from_utf8(line).map_err(|_| IdentificationError::Character)?;
        let software = line.strip_prefix("SSH-2.0-").ok_or(IdentificationError::SshVersion)?;
        let Some(ours) = software.strip_prefix("caponier_") else { return Ok(Self::Stock) };
        let (major, comment) = match ours.split_once(' ') {
            Some((major, comment)) => (major, Some(comment)),
            None => (ours, None),
        };
        // One version has one spelling: no sign, no leading zero.
        let spelt = |number: &u32| number.to_string() == major;
        let major: u32 = major.parse().ok().filter(spelt).ok_or(IdentificationError::Malformed)?;
        if major != MAJOR {
            return Err(IdentificationError::Major(major));
        }
        match comment {
            None => Ok(Self::Door),
            Some("client") => Ok(Self::Client),
            Some(comment) => {
                let claim = comment.strip_prefix("agent=").ok_or(IdentificationError::Malformed)?;
                let mut parts = claim.splitn(3, '/');
                let mut part = || parts.next().ok_or(IdentificationError::Malformed);
                let organisation = part()?.parse().map_err(|_| IdentificationError::Malformed)?;
                let agent = part()?.parse().map_err(|_| IdentificationError::Malformed)?;
                let replica = parts.next().map(str::parse).transpose().map_err(|_| IdentificationError::Malformed)?;
                Ok(Self::Agent { name: AgentName { organisation, agent }, replica })
            }
        }
    }
}

/// What an agent sends as its identification, without the line end.
#[must_use]
pub fn agent_line(name: &AgentName, replica: &ReplicaId) -> String {
    format!("SSH-2.0-caponier_{MAJOR} agent={name}/{replica}")
}

/// The identifier of one forward: 24 hexadecimal digits, drawn at random.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ForwardId(Box<str>);

impl ForwardId {
    /// A new identifier.
    #[must_use]
    pub fn random() -> Self {
        Self(hex(&secret::random::<12>()))
    }

    /// The identifier as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ForwardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ForwardId {
    type Err = MalformedError;

    fn from_str(text: &str) -> Result<Self, MalformedError> {
        if is_hex(text, 24) { Ok(Self(text.into())) } else { Err(MalformedError("forward id")) }
    }
}

/// Something of ours that is not formed as this module says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0}")]
pub struct MalformedError(&'static str);

/// What the gateway tells an agent about whom a forward is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Originator {
    /// The gateway's forward id.
    pub forward: ForwardId,
    /// The principal the gateway speaks for.
    pub principal: PrincipalId,
    /// The address of the principal's client as the gateway saw it; at most 64 bytes of printable ASCII.
    pub client: String,
}

impl fmt::Display for Originator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "caponier{MAJOR}:{}:{}:{}", self.forward, self.principal, self.client)
    }
}

impl Originator {
    /// Reads the field; `None` where it is a stock client's.
    ///
    /// # Errors
    /// If it claims to be ours and is not well formed.
    pub fn parse(text: &str) -> Result<Option<Self>, MalformedError> {
        if !text.starts_with("caponier") {
            return Ok(None);
        }
        let malformed = MalformedError("originator");
        let mut parts = text.splitn(4, ':');
        if parts.next() != Some("caponier1") {
            return Err(malformed);
        }
        let mut part = || parts.next().ok_or(malformed);
        let forward = part()?.parse()?;
        let principal = part()?.parse().map_err(|_| malformed)?;
        let client = part()?;
        if client.len() > 64 || !client.bytes().all(|byte| (0x21..0x7f).contains(&byte)) {
            return Err(malformed);
        }
        Ok(Some(Self { forward, principal, client: client.to_owned() }))
    }
}

/// Why an agent refuses a forward. The numbers are the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RefusalCode {
    /// The agent's allowlist says no.
    Denied = 0xFE00_0001,
    /// The name does not resolve.
    Unresolved = 0xFE00_0002,
    /// No permitted address could be connected to.
    ConnectFailed = 0xFE00_0003,
    /// The agent cannot record the forward.
    Unrecorded = 0xFE00_0004,
    /// A limit of the agent is reached.
    Limit = 0xFE00_0005,
    /// The end that refuses is going away, or retires this link: another one may serve. Sent by an agent on a link, and by a
    /// gateway that drains to our own clients at its door.
    Draining = 0xFE00_0006,
    /// The request is not well formed, or repeats a live forward's id.
    Malformed = 0xFE00_0007,
}

impl RefusalCode {
    /// Reads the number; `None` for one that is not ours.
    #[must_use]
    pub fn from_wire(code: u32) -> Option<Self> {
        [
            Self::Denied,
            Self::Unresolved,
            Self::ConnectFailed,
            Self::Unrecorded,
            Self::Limit,
            Self::Draining,
            Self::Malformed,
        ]
        .into_iter()
        .find(|known| *known as u32 == code)
    }

    /// The reason as the audit writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Denied => "agent_denied",
            Self::Unresolved => "unresolved",
            Self::ConnectFailed => "connect_failed",
            Self::Unrecorded => "agent_unrecorded",
            Self::Limit => "agent_limit",
            Self::Draining => "agent_draining",
            Self::Malformed => "agent_malformed",
        }
    }
}

/// The description of a refusal: the gateway's forward id, then words for its operator.
#[must_use]
pub fn refusal_text(forward: Option<&ForwardId>, words: &str) -> String {
    match forward {
        Some(forward) => format!("{forward} {words}"),
        None => words.to_owned(),
    }
}

/// Splits a refusal's description into the forward id and the words, which are bounded and stripped of control characters.
#[must_use]
pub fn parse_refusal(text: &str) -> Option<(ForwardId, String)> {
    let (forward, words) = text.split_once(' ')?;
    let words = words.chars().filter(|c| !c.is_control()).take(256).collect();
    Some((forward.parse().ok()?, words))
}

/// The first message on the control channel, from each end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The program's version, for people.
    pub version: String,
    /// What this end can do beyond the major version.
    #[serde(default)]
    pub features: Vec<String>,
    /// The most channels this end lets the other hold open.
    pub channels: u32,
    /// The agent's replica; absent from a gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    /// Which process of the agent's this is, among those that may have the replica's name one after another; absent from a
    /// gateway, and from agents of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// When that process was started, by its own clock: Unix time in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// Which of the gateways in its configuration that process has dialled, as a number of its own: links of two are no
    /// replacement for each other, even if both lead to one gateway. Absent where `instance` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<u32>,
}

/// One process of an agent: 16 hexadecimal digits, drawn at random when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(Box<str>);

impl InstanceId {
    /// A new identifier.
    #[must_use]
    pub fn random() -> Self {
        Self(hex(&secret::random::<8>()))
    }

    /// The identifier as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InstanceId {
    type Err = MalformedError;

    fn from_str(text: &str) -> Result<Self, MalformedError> {
        if is_hex(text, 16) { Ok(Self(text.into())) } else { Err(MalformedError("instance id")) }
    }
}

impl TryFrom<String> for InstanceId {
    type Error = MalformedError;

    fn try_from(text: String) -> Result<Self, MalformedError> {
        text.parse()
    }
}

impl From<InstanceId> for String {
    fn from(id: InstanceId) -> Self {
        id.0.into()
    }
}

fn hex(bytes: &[u8]) -> Box<str> {
    use std::fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text.into()
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// A message on the control channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// See [`Hello`].
    Hello(Hello),
    /// Either way: this end goes away. Give this link no new forwards; what runs on it may go on for so long. An agent makes
    /// another link to the gateway, where it can.
    Drain(Drain),
    /// From the gateway: make another link, then this one retires. Said where only the link has to change (another login
    /// key), while the gateway stays.
    Move,
    /// From the gateway: another process with this replica name, started later, is linked, and is the one that gets forwards.
    Superseded,
    /// From the gateway: the key that this link's agent has shown comes to its end there.
    KeyNotice(KeyNotice),
    /// Either way: this is what the sender's trail has come to. The other end puts it on record and answers; seldom, as
    /// [`crate::limits::ANCHORS_BURST`] says.
    Anchor(TrailAnchor),
    /// Either way: an anchor is on record here.
    Anchored(TrailAnchored),
    /// From the gateway: look at your targets, and tell what was found. From an agent, in the place of its hello: its owner has
    /// looked whether it would be let in, and wants no link.
    Examine,
    /// From an agent: what was found.
    Examined(Report),
    /// A kind this version does not know.
    Unknown(u16),
}

/// See [`Control::Drain`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Seconds from now until what still runs is cut.
    pub deadline_s: u32,
}

/// See [`Control::KeyNotice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNotice {
    /// From when on the key is refused: Unix time in seconds.
    pub expires: u64,
}

/// See [`Control::Anchor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrailAnchor {
    /// Which trail, so that it is known what the anchor is of; the id says nothing else.
    pub trail: TrailId,
    /// The digest of its head.
    pub anchor: Anchor,
}

/// See [`Control::Anchored`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrailAnchored {
    /// The digest that was sent.
    pub anchor: Anchor,
    /// When it was put on record: Unix time in milliseconds.
    pub time_ms: u64,
    /// The countersignature, of an end that signs its trail.
    pub seal: Option<Seal>,
}

/// [`TrailAnchor`] as it stands on the wire.
#[derive(Serialize, Deserialize)]
struct AnchorBody {
    trail: String,
    anchor: String,
}

/// [`TrailAnchored`] as it stands on the wire.
#[derive(Serialize, Deserialize)]
struct AnchoredBody {
    anchor: String,
    time: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signature: Option<String>,
}

impl TrailAnchor {
    fn body(&self) -> AnchorBody {
        AnchorBody { trail: self.trail.to_string(), anchor: self.anchor.to_string() }
    }

    fn read(body: &[u8]) -> Option<Self> {
        let body: AnchorBody = serde_json::from_slice(body).ok()?;
        Some(Self { trail: TrailId::parse(&body.trail)?, anchor: Anchor::parse(&body.anchor)? })
    }
}

impl TrailAnchored {
    fn body(&self) -> AnchoredBody {
        AnchoredBody {
            anchor: self.anchor.to_string(),
            time: self.time_ms,
            key: self.seal.as_ref().map(|seal| seal.key.to_string()),
            signature: self.seal.as_ref().map(|seal| seal.signature.clone()),
        }
    }

    fn read(body: &[u8]) -> Option<Self> {
        let body: AnchoredBody = serde_json::from_slice(body).ok()?;
        let seal = match (body.key, body.signature) {
            (None, None) => None,
            (Some(key), Some(signature)) => {
                let key: Fingerprint = key.parse().ok()?;
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
                if signature.len() > SIGNATURE_TEXT_MAX || !signature.bytes().all(plain) {
                    return None;
                }
                Some(Seal { key, signature })
            }
            _ => return None,
        };
        Some(Self { anchor: Anchor::parse(&body.anchor)?, time_ms: body.time, seal })
    }
}

/// The body of a message that says all by its kind; an object, so that a later version may add to it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Plain {}

const KIND_HELLO: u16 = 1;
const KIND_DRAIN: u16 = 2;
const KIND_MOVE: u16 = 3;
const KIND_SUPERSEDED: u16 = 4;
const KIND_KEY_NOTICE: u16 = 5;
const KIND_ANCHOR: u16 = 6;
const KIND_ANCHORED: u16 = 7;
const KIND_EXAMINE: u16 = 8;
const KIND_EXAMINED: u16 = 9;

impl Control {
    /// Encodes the message with its length.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let (kind, body) = match self {
            Self::Hello(hello) => (KIND_HELLO, serde_json::to_vec(hello).unwrap_or_default()),
            Self::Drain(drain) => (KIND_DRAIN, serde_json::to_vec(drain).unwrap_or_default()),
            Self::Move => (KIND_MOVE, serde_json::to_vec(&Plain {}).unwrap_or_default()),
            Self::Superseded => (KIND_SUPERSEDED, serde_json::to_vec(&Plain {}).unwrap_or_default()),
            Self::KeyNotice(notice) => (KIND_KEY_NOTICE, serde_json::to_vec(notice).unwrap_or_default()),
            Self::Anchor(anchor) => (KIND_ANCHOR, serde_json::to_vec(&anchor.body()).unwrap_or_default()),
            Self::Anchored(anchored) => (KIND_ANCHORED, serde_json::to_vec(&anchored.body()).unwrap_or_default()),
            Self::Examine => (KIND_EXAMINE, serde_json::to_vec(&Plain {}).unwrap_or_default()),
            Self::Examined(report) => (KIND_EXAMINED, serde_json::to_vec(report).unwrap_or_default()),
            Self::Unknown(kind) => (*kind, Vec::new()),
        };
        let mut bytes = BytesMut::with_capacity(body.len() + 6);
        // A message of ours is far below the limit; one that is not would be refused by the peer.
        bytes.put_u32(u32::try_from(body.len() + 2).unwrap_or(u32::MAX));
        bytes.put_u16(kind);
        bytes.put_slice(&body);
        bytes.freeze()
    }

    /// Takes one message off the front of `buffer`; `None` where it is not complete yet.
    ///
    /// # Errors
    /// If the length exceeds [`CONTROL_MAX`] or a body does not read.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, MalformedError> {
        let malformed = MalformedError("control message");
        let Some(mut head) = buffer.get(..4) else { return Ok(None) };
        let length = usize::try_from(head.get_u32()).unwrap_or(usize::MAX);
        if !(2..=CONTROL_MAX).contains(&length) {
            return Err(malformed);
        }
        if buffer.len() < length + 4 {
            return Ok(None);
        }
        buffer.advance(4);
        let mut body = buffer.split_to(length);
        match body.get_u16() {
            KIND_HELLO => {
                let hello: Hello = serde_json::from_slice(&body).map_err(|_| malformed)?;
                let text = |text: &str| text.len() <= 64 && text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
                let clean = text(&hello.version)
                    && hello.features.len() <= 64
                    && hello.features.iter().all(|feature| text(feature))
                    && hello.replica.as_deref().is_none_or(text);
                if clean { Ok(Some(Self::Hello(hello))) } else { Err(malformed) }
            }
            KIND_DRAIN => serde_json::from_slice(&body).map(|drain| Some(Self::Drain(drain))).map_err(|_| malformed),
            KIND_MOVE => serde_json::from_slice(&body).map(|Plain {}| Some(Self::Move)).map_err(|_| malformed),
            KIND_SUPERSEDED => {
                serde_json::from_slice(&body).map(|Plain {}| Some(Self::Superseded)).map_err(|_| malformed)
            }
            KIND_KEY_NOTICE => {
                serde_json::from_slice(&body).map(|notice| Some(Self::KeyNotice(notice))).map_err(|_| malformed)
            }
            KIND_ANCHOR => TrailAnchor::read(&body).map(|anchor| Some(Self::Anchor(anchor))).ok_or(malformed),
            KIND_ANCHORED => TrailAnchored::read(&body).map(|anchored| Some(Self::Anchored(anchored))).ok_or(malformed),
            KIND_EXAMINE => serde_json::from_slice(&body).map(|Plain {}| Some(Self::Examine)).map_err(|_| malformed),
            KIND_EXAMINED => {
                serde_json::from_slice(&body).map(|report| Some(Self::Examined(report))).map_err(|_| malformed)
            }
            kind => Ok(Some(Self::Unknown(kind))),
        }
    }
}

#[cfg(test)]
mod tests;
