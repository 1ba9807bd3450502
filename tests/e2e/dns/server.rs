//! A DNS server that says what a test tells it to, over UDP and TCP, written by hand so that it can lie in every way.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use caponier::task::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

pub(crate) const A: u16 = 1;
pub(crate) const CNAME: u16 = 5;
pub(crate) const SOA: u16 = 6;
pub(crate) const AAAA: u16 = 28;
pub(crate) const SRV: u16 = 33;

pub(crate) const NOERROR: u8 = 0;
pub(crate) const SERVFAIL: u8 = 2;
pub(crate) const NXDOMAIN: u8 = 3;
pub(crate) const REFUSED: u8 = 5;

/// One record of an answer; without a name of its own it belongs to the name that was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    name: Option<String>,
    ttl: u32,
    kind: u16,
    data: Vec<u8>,
}

impl Record {
    pub(crate) fn address(address: &str, ttl: u32) -> Self {
        let (kind, data) = match address.parse().expect(address) {
            IpAddr::V4(address) => (A, address.octets().to_vec()),
            IpAddr::V6(address) => (AAAA, address.octets().to_vec()),
        };
        Self { name: None, ttl, kind, data }
    }

    pub(crate) fn alias(to: &str, ttl: u32) -> Self {
        Self { name: None, ttl, kind: CNAME, data: labels(to) }
    }

    pub(crate) fn service(priority: u16, weight: u16, port: u16, target: &str) -> Self {
        let mut data = [priority, weight, port].map(u16::to_be_bytes).concat();
        data.extend(labels(target));
        Self { name: None, ttl: 0, kind: SRV, data }
    }

    /// The record belongs to another name than the one that was asked for.
    pub(crate) fn of(self, name: &str) -> Self {
        Self { name: Some(name.to_owned()), ..self }
    }
}

/// What the server does with a question.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// These records.
    Records(Vec<Record>),
    /// These records, which are too many for UDP.
    OverTcp(Vec<Record>),
    /// None, with this code, and for so long if that is said.
    Nothing(u8, Option<u32>),
    /// Nothing is heard of it.
    Silence,
    /// These records, with another number than that of the question, and nothing else.
    WrongId(Vec<Record>),
    /// These records, to a question about another name.
    WrongQuestion(Vec<Record>),
    /// Too many for UDP, and over TCP the connection is closed.
    Broken,
    /// First forged answers with a wrong number and a wrong question, then these.
    ForgedThen(Vec<Record>, Vec<Record>),
}

/// The server; it ends with the test's runtime.
pub(crate) struct Dns {
    pub(crate) address: SocketAddr,
    shared: Arc<Mutex<Zone>>,
    _tasks: Tasks,
}

#[derive(Default)]
struct Zone {
    /// By name and type: what is said the first time, the second time, and so on; the last one from then on.
    replies: HashMap<(String, u16), Vec<Reply>>,
    /// The numbers of the questions, by name, type, and whether they came over TCP. One that is sent again is the same one.
    asked: HashMap<(String, u16, bool), Vec<u16>>,
}

impl Dns {
    pub(crate) async fn start() -> Self {
        let (listener, socket) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
            // The same port may be taken for the other protocol.
            if let Ok(socket) = UdpSocket::bind(listener.local_addr().expect("its address")).await {
                break (listener, socket);
            }
        };
        let address = socket.local_addr().expect("its address");
        let (shared, tasks) = (Arc::<Mutex<Zone>>::default(), Tasks::new());
        let zone = shared.clone();
        tasks.spawn(async move {
            let mut packet = vec![0; 4096];
            while let Ok((length, peer)) = socket.recv_from(&mut packet).await {
                for answer in zone.lock().expect("whole").answer(&packet[..length], false) {
                    drop(socket.try_send_to(&answer, peer));
                }
            }
        });
        let (zone, connections) = (shared.clone(), tasks.clone());
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let zone = zone.clone();
                connections.spawn(async move {
                    while let Ok(length) = stream.read_u16().await {
                        let mut packet = vec![0; length.into()];
                        if stream.read_exact(&mut packet).await.is_err() {
                            return;
                        }
                        let answers = zone.lock().expect("whole").answer(&packet, true);
                        if answers.is_empty() {
                            return;
                        }
                        for answer in answers {
                            let length = u16::try_from(answer.len()).expect("a message fits").to_be_bytes();
                            drop(stream.write_all(&[&length[..], &answer].concat()).await);
                        }
                    }
                });
            }
        });
        Self { address, shared, _tasks: tasks }
    }

    /// From now on this is said about the name and type, in turn; the last one for good.
    pub(crate) fn say(&self, name: &str, kind: u16, replies: &[Reply]) {
        let mut zone = self.shared.lock().expect("whole");
        zone.replies.insert((name.to_owned(), kind), replies.to_vec());
        zone.asked.retain(|(known, of, _), _| (known.as_str(), *of) != (name, kind));
    }

    /// From now on the name has these addresses, for so long.
    pub(crate) fn has(&self, name: &str, addresses: &[&str], ttl: u32) {
        for kind in [A, AAAA] {
            let records: Vec<_> = addresses
                .iter()
                .map(|address| Record::address(address, ttl))
                .filter(|record| record.kind == kind)
                .collect();
            let reply = if records.is_empty() { Reply::Nothing(NOERROR, Some(ttl)) } else { Reply::Records(records) };
            self.say(name, kind, &[reply]);
        }
    }

    /// How many questions there were about the name and type, over UDP.
    pub(crate) fn asked(&self, name: &str, kind: u16) -> usize {
        let zone = self.shared.lock().expect("whole");
        zone.asked.get(&(name.to_owned(), kind, false)).map_or(0, Vec::len)
    }
}

impl Zone {
    /// What is sent back for a packet: each of these.
    fn answer(&mut self, packet: &[u8], tcp: bool) -> Vec<Vec<u8>> {
        let Some((id, name, kind)) = question(packet) else { return Vec::new() };
        let numbers = self.asked.entry((name.clone(), kind, tcp)).or_default();
        let turn = numbers.iter().position(|number| *number == id).unwrap_or_else(|| {
            numbers.push(id);
            numbers.len() - 1
        });
        let reply = match self.replies.get(&(name.clone(), kind)) {
            Some(replies) => replies[turn.min(replies.len() - 1)].clone(),
            // Whatever has other records exists.
            None if self.replies.keys().any(|(known, _)| *known == name) => Reply::Nothing(NOERROR, None),
            None => Reply::Nothing(NXDOMAIN, None),
        };
        let whole = |id, asked: &str, records: &[Record]| message(id, asked, kind, NOERROR, false, records);
        match reply {
            Reply::Records(records) => vec![whole(id, &name, &records)],
            Reply::OverTcp(records) if tcp => vec![whole(id, &name, &records)],
            Reply::OverTcp(_) => vec![message(id, &name, kind, NOERROR, true, &[])],
            Reply::Broken if tcp => vec![],
            Reply::Broken => vec![message(id, &name, kind, NOERROR, true, &[])],
            Reply::Nothing(code, life) => vec![nothing(id, &name, kind, code, life)],
            Reply::Silence => vec![],
            Reply::WrongId(records) => vec![whole(id.wrapping_add(1), &name, &records)],
            Reply::WrongQuestion(records) => vec![whole(id, "other.internal", &records)],
            Reply::ForgedThen(forged, records) => vec![
                whole(id.wrapping_add(1), &name, &forged),
                whole(id, "other.internal", &forged),
                whole(id, &name, &records),
            ],
        }
    }
}

/// Number, name and type of a question.
fn question(packet: &[u8]) -> Option<(u16, String, u16)> {
    let number = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (mut at, mut name) = (12, String::new());
    loop {
        let length = usize::from(*packet.get(at)?);
        if length == 0 {
            break;
        }
        let label = String::from_utf8_lossy(packet.get(at + 1..=at + length)?).to_ascii_lowercase();
        name = if name.is_empty() { label } else { format!("{name}.{label}") };
        at += length + 1;
    }
    Some((number(0)?, name, number(at + 1)?))
}

fn message(id: u16, asked: &str, kind: u16, code: u8, truncated: bool, records: &[Record]) -> Vec<u8> {
    let count = u16::try_from(records.len()).expect("few records");
    let mut bytes = header(id, code, truncated, count, 0);
    bytes.extend(labels(asked));
    bytes.extend([kind.to_be_bytes(), [0, 1]].concat());
    for record in records {
        write_record(&mut bytes, record, asked);
    }
    bytes
}

fn nothing(id: u16, asked: &str, kind: u16, code: u8, life: Option<u32>) -> Vec<u8> {
    let mut bytes = header(id, code, false, 0, u16::from(life.is_some()));
    bytes.extend(labels(asked));
    bytes.extend([kind.to_be_bytes(), [0, 1]].concat());
    if let Some(life) = life {
        let mut data = [labels("ns.internal"), labels("admin.internal")].concat();
        for number in [1, 3_600, 600, 86_400, life] {
            data.extend(number.to_be_bytes());
        }
        write_record(&mut bytes, &Record { name: None, ttl: life, kind: SOA, data }, "internal");
    }
    bytes
}

fn header(id: u16, code: u8, truncated: bool, answers: u16, authorities: u16) -> Vec<u8> {
    // An answer, recursion desired and available.
    let flags = [0x81 | u8::from(truncated) << 1, 0x80 | code];
    let mut bytes = [id.to_be_bytes(), flags].concat();
    for count in [1, answers, authorities, 0] {
        bytes.extend(count.to_be_bytes());
    }
    bytes
}

fn write_record(bytes: &mut Vec<u8>, record: &Record, asked: &str) {
    match &record.name {
        Some(name) => bytes.extend(labels(name)),
        // A pointer to the question, so that a thousand fit into a message.
        None if bytes.len() > 12 && record.kind != SOA => bytes.extend([0xc0, 12]),
        None => bytes.extend(labels(asked)),
    }
    bytes.extend([record.kind.to_be_bytes(), [0, 1]].concat());
    bytes.extend(record.ttl.to_be_bytes());
    bytes.extend(u16::try_from(record.data.len()).expect("short data").to_be_bytes());
    bytes.extend(&record.data);
}

fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).expect("a short label"));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

/// Loopback has many addresses.
pub(crate) fn local(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, last)
}
