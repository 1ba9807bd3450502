//! Frames of a WebSocket (RFC 6455 §5), without any I/O.

use std::fmt;

use super::Role;
use crate::limits;
use crate::secret;

/// What a control frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Control {
    Close,
    Ping,
    Pong,
}

/// What the other end does that ours never do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("the peer sends WebSocket text, and SSH is binary")]
    Text,
    #[error("the peer sends a WebSocket message of more than {} bytes", limits::WEBSOCKET_MESSAGE_MAX)]
    Oversize,
    #[error("the peer masks what it should not, or does not mask what it should")]
    Mask,
    #[error("the peer uses WebSocket extensions, or frames of a kind that there is not")]
    Reserved,
    #[error("the peer begins a WebSocket message within another, or goes on with none")]
    Fragment,
    #[error("the peer sends a WebSocket control frame that is in parts or too long")]
    Control,
    #[error("the peer writes the length of a WebSocket frame in a longer form than it needs")]
    Length,
    #[error("the peer sends frames without anything in them over and over")]
    Flood,
}

impl Violation {
    /// How it is told (§7.4.1).
    pub(super) fn code(self) -> u16 {
        match self {
            Self::Text => 1003,
            Self::Oversize => 1009,
            Self::Flood => 1008,
            Self::Mask | Self::Reserved | Self::Fragment | Self::Control | Self::Length => 1002,
        }
    }
}

/// What the other end said when it closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) struct Close(Option<u16>);

impl Close {
    /// By the payload of its frame. What it says in words is not repeated: it may come from anybody.
    pub(super) fn of(payload: &[u8]) -> Self {
        Self(payload.first_chunk().map(|code| u16::from_be_bytes(*code)))
    }

    /// Whether the stream was at its end.
    pub(super) fn is_orderly(self) -> bool {
        matches!(self.0, None | Some(NORMAL | GOING_AWAY))
    }

    /// The payload of our frame.
    pub(super) fn answer(self) -> Vec<u8> {
        self.0.map(|code| code.to_be_bytes().to_vec()).unwrap_or_default()
    }
}

impl fmt::Display for Close {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(code) => write!(f, "the peer, or a balancer between, closed the WebSocket with code {code}"),
            None => f.write_str("the peer closed the WebSocket"),
        }
    }
}

/// The code of an end that was wanted (§7.4.1).
pub(super) const NORMAL: u16 = 1000;

/// The code of an end because a server stops.
const GOING_AWAY: u16 = 1001;

/// A control frame, with what it carries.
pub(super) type Event = (Control, Vec<u8>);

/// What comes in, taken apart as it comes.
pub(super) struct Incoming {
    role: Role,
    /// The beginning of a frame, as far as it has come.
    header: [u8; HEADER_MAX],
    gathered: usize,
    frame: Option<Frame>,
    /// The bytes of a message that is not complete, those of the frame that is under way included.
    message: Option<u64>,
    /// Frames in a row that had nothing for anybody.
    idle: usize,
}

/// A frame that is under way.
struct Frame {
    kind: Kind,
    left: u64,
    mask: [u8; 4],
    /// How much of it has been unmasked, of which four make no difference.
    unmasked: usize,
}

enum Kind {
    Data,
    Control(Control, Vec<u8>),
}

impl Incoming {
    pub(super) fn new(role: Role) -> Self {
        Self { role, header: [0; HEADER_MAX], gathered: 0, frame: None, message: None, idle: 0 }
    }

    /// Takes the frames apart that `chunk` is made of, and moves what they carry to its front. Yields how much that is, and
    /// the control frames that have come; a close or a violation is the last of them, and nothing after it is looked at.
    pub(super) fn take(&mut self, chunk: &mut [u8]) -> (usize, Vec<Result<Event, Violation>>) {
        let (mut at, mut kept) = (0, 0);
        let mut events = Vec::new();
        loop {
            let Some(frame) = &mut self.frame else {
                let Some(byte) = chunk.get(at) else { break };
                self.header[self.gathered] = *byte;
                self.gathered += 1;
                at += 1;
                if self.gathered < header_len(&self.header[..self.gathered]) {
                    continue;
                }
                match self.begin() {
                    Ok(frame) => self.frame = Some(frame),
                    Err(violation) => {
                        events.push(Err(violation));
                        break;
                    }
                }
                self.gathered = 0;
                continue;
            };
            let n = usize::try_from(frame.left).unwrap_or(usize::MAX).min(chunk.len() - at);
            apply(&mut chunk[at..at + n], frame.mask, frame.unmasked);
            frame.unmasked = (frame.unmasked + n) % 4;
            frame.left -= n as u64;
            match &mut frame.kind {
                Kind::Data => {
                    chunk.copy_within(at..at + n, kept);
                    kept += n;
                    if n > 0 {
                        self.idle = 0;
                    }
                }
                Kind::Control(_, payload) => payload.extend_from_slice(&chunk[at..at + n]),
            }
            at += n;
            if frame.left > 0 {
                break;
            }
            if let Some(Frame { kind: Kind::Control(control, payload), .. }) = self.frame.take() {
                events.push(Ok((control, payload)));
                if control == Control::Close {
                    break;
                }
            }
        }
        (kept, events)
    }

    /// Judges a header that has come.
    fn begin(&mut self) -> Result<Frame, Violation> {
        let header = &self.header[..self.gathered];
        let (last, code) = (header[0] & 0x80 != 0, header[0] & 0x0f);
        let masked = header[1] & 0x80 != 0;
        if header[0] & 0x70 != 0 {
            return Err(Violation::Reserved);
        }
        if masked != (self.role == Role::Server) {
            return Err(Violation::Mask);
        }
        let (left, least, after) = match header[1] & 0x7f {
            126 => (u64::from(u16::from_be_bytes([header[2], header[3]])), 126, 4),
            127 => (u64::from_be_bytes(header[2..10].try_into().map_err(|_| Violation::Length)?), 1 << 16, 10),
            short => (u64::from(short), 0, 2),
        };
        if left < least {
            return Err(Violation::Length);
        }
        let mask = if masked { header[after..].try_into().map_err(|_| Violation::Length)? } else { [0; 4] };
        self.idle += 1;
        if self.idle > limits::WEBSOCKET_IDLE_FRAMES {
            return Err(Violation::Flood);
        }
        let kind = match code {
            CONTINUATION | BINARY => {
                let before = match (code, self.message) {
                    (BINARY, None) => 0,
                    (CONTINUATION, Some(before)) => before,
                    _ => return Err(Violation::Fragment),
                };
                let message = before.saturating_add(left);
                if message > limits::WEBSOCKET_MESSAGE_MAX {
                    return Err(Violation::Oversize);
                }
                self.message = (!last).then_some(message);
                Kind::Data
            }
            TEXT => return Err(Violation::Text),
            CLOSE | PING | PONG => {
                if !last || left > CONTROL_MAX {
                    return Err(Violation::Control);
                }
                let control = match code {
                    CLOSE => Control::Close,
                    PING => Control::Ping,
                    _ => Control::Pong,
                };
                Kind::Control(control, Vec::new())
            }
            _ => return Err(Violation::Reserved),
        };
        Ok(Frame { kind, left, mask, unmasked: 0 })
    }
}

/// How long the header is of which this has come; at least one byte more than that, if it cannot be told yet.
fn header_len(header: &[u8]) -> usize {
    let Some(second) = header.get(1) else { return 2 };
    let length = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    2 + length + if second & 0x80 == 0 { 0 } else { 4 }
}

/// Appends a message with these bytes, of which there is at least one.
pub(super) fn write_data(outgoing: &mut Vec<u8>, role: Role, bytes: &[u8]) {
    write(outgoing, role, BINARY, bytes);
}

/// Appends a control frame, of which the payload is cut to what one may carry.
pub(super) fn write_control(outgoing: &mut Vec<u8>, role: Role, control: Control, payload: &[u8]) {
    let code = match control {
        Control::Close => CLOSE,
        Control::Ping => PING,
        Control::Pong => PONG,
    };
    write(outgoing, role, code, &payload[..payload.len().min(CONTROL_MAX as usize)]);
}

fn write(outgoing: &mut Vec<u8>, role: Role, code: u8, payload: &[u8]) {
    let masked = if role == Role::Client { 0x80 } else { 0 };
    outgoing.reserve(HEADER_MAX + payload.len());
    outgoing.push(0x80 | code);
    match payload.len() {
        len @ 0..126 => outgoing.push(masked | len as u8),
        len @ 126..=0xffff => {
            outgoing.push(masked | 126);
            outgoing.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            outgoing.push(masked | 127);
            outgoing.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    let mask = match role {
        Role::Client => secret::random::<4>(),
        Role::Server => [0; 4],
    };
    if role == Role::Client {
        outgoing.extend_from_slice(&mask);
    }
    let at = outgoing.len();
    outgoing.extend_from_slice(payload);
    apply(&mut outgoing[at..], mask, 0);
}

/// Masks, or unmasks, what begins `offset` bytes into its frame.
fn apply(bytes: &mut [u8], mut mask: [u8; 4], offset: usize) {
    if mask == [0; 4] {
        return;
    }
    mask.rotate_left(offset % 4);
    let twice = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    let (eights, rest) = bytes.as_chunks_mut::<8>();
    for eight in eights {
        *eight = (u64::from_ne_bytes(*eight) ^ twice).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

/// Two bytes, the longest form of a length, and a mask.
const HEADER_MAX: usize = 14;

/// What a control frame may carry (§5.5).
const CONTROL_MAX: u64 = 125;
