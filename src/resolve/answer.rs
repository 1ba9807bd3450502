//! What a DNS server's answer says about the name that was asked for, and nothing else that it holds.
//!
//! Promised: only records of the answer section count, of the type asked for, that belong to the name asked for or to one
//! that aliases (CNAME) lead to from there; an answer to another question is none. Records for any other name, and
//! whatever stands in the other sections, are passed over. No I/O, no waiting.

use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::proto::op::{Message, Query, ResponseCode};
use hickory_resolver::proto::rr::{DNSClass, Name, RData, RecordType};

use super::service::Instance;
use crate::limits::{ADDRESSES_PER_NAME, ALIASES_MAX, SERVICE_RECORDS};

/// What is asked about a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Ipv4,
    Ipv6,
    Service,
}

/// What a server says, as far as it is to be believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// These are the records, for so long.
    Records { records: Records, life: Duration },
    /// The name stands for another one, of which the answer says nothing.
    Alias { to: String, life: Duration },
    /// There are none, and for so long there will be none. Whether the name exists at all is another thing.
    Nothing { exists: bool, life: Duration },
}

/// At least one of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Records {
    Addresses(Vec<IpAddr>),
    Instances(Vec<Instance>),
}

/// Why an answer is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("it answered another question")]
    Question,
    #[error("more than {ALIASES_MAX} aliases, or aliases in a circle")]
    Aliases,
}

impl Kind {
    pub(super) fn record_type(self) -> RecordType {
        match self {
            Self::Ipv4 => RecordType::A,
            Self::Ipv6 => RecordType::AAAA,
            Self::Service => RecordType::SRV,
        }
    }

    fn read(self, data: &RData) -> Option<Record> {
        match (self, data) {
            (Self::Ipv4, RData::A(address)) => Some(Record::Address(IpAddr::V4(address.0))),
            (Self::Ipv6, RData::AAAA(address)) => Some(Record::Address(IpAddr::V6(address.0))),
            (Self::Service, RData::SRV(srv)) => Some(Record::Instance(Instance {
                priority: srv.priority,
                weight: srv.weight,
                port: srv.port,
                target: spelling(&srv.target),
            })),
            _ => None,
        }
    }
}

enum Record {
    Address(IpAddr),
    Instance(Instance),
}

/// A name in the form in which names are compared here: lower case, without a trailing dot; the root is empty.
pub(super) fn spelling(name: &Name) -> String {
    let mut text = name.to_ascii().to_ascii_lowercase();
    text.truncate(text.trim_end_matches('.').len());
    text
}

/// Whether these are the questions that were asked: one, and this one.
pub(super) fn is_asked(questions: &[Query], name: &str, kind: Kind) -> bool {
    match questions {
        [question] => {
            question.query_type() == kind.record_type()
                && question.query_class() == DNSClass::IN
                && spelling(question.name()) == name
        }
        _ => false,
    }
}

/// Reads what `message` says about `name`. `aliases` counts those followed, over all answers of one lookup.
pub(super) fn read(message: &Message, name: &str, kind: Kind, aliases: &mut usize) -> Result<Answer, AnswerError> {
    if !is_asked(&message.queries, name, kind) {
        return Err(AnswerError::Question);
    }
    let mut current = name.to_owned();
    let mut life = u32::MAX;
    loop {
        let own = || {
            message
                .answers
                .iter()
                .filter(|record| record.dns_class == DNSClass::IN && spelling(&record.name) == current)
        };
        let found: Vec<(Record, u32)> =
            own().filter_map(|record| Some((kind.read(&record.data)?, record.ttl))).take(most(kind)).collect();
        if !found.is_empty() {
            let life = found.iter().map(|(_, ttl)| *ttl).fold(life, u32::min);
            return Ok(Answer::Records { records: collect(found), life: seconds(life) });
        }
        let alias = own().find_map(|record| match &record.data {
            RData::CNAME(to) => Some((spelling(&to.0), record.ttl)),
            _ => None,
        });
        let Some((to, ttl)) = alias else { break };
        *aliases += 1;
        if *aliases > ALIASES_MAX {
            return Err(AnswerError::Aliases);
        }
        life = life.min(ttl);
        current = to;
    }
    let exists = message.response_code != ResponseCode::NXDomain;
    if current != name && exists && soa(message).is_none() {
        return Ok(Answer::Alias { to: current, life: seconds(life) });
    }
    // RFC 2308 §5: without an SOA record nothing says for how long.
    let life = soa(message).map_or(0, |negative| negative.min(life));
    Ok(Answer::Nothing { exists, life: seconds(life) })
}

/// For how long nothing will be there, according to the zone's SOA record (RFC 2308 §3).
fn soa(message: &Message) -> Option<u32> {
    message.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    })
}

fn most(kind: Kind) -> usize {
    match kind {
        Kind::Ipv4 | Kind::Ipv6 => ADDRESSES_PER_NAME,
        Kind::Service => SERVICE_RECORDS,
    }
}

fn collect(found: Vec<(Record, u32)>) -> Records {
    let (mut addresses, mut instances) = (Vec::new(), Vec::new());
    for (record, _) in found {
        match record {
            Record::Address(address) => addresses.push(address),
            Record::Instance(instance) => instances.push(instance),
        }
    }
    if instances.is_empty() { Records::Addresses(addresses) } else { Records::Instances(instances) }
}

/// RFC 2181 §8: a lifetime with the highest bit set is none.
fn seconds(ttl: u32) -> Duration {
    Duration::from_secs(if ttl > i32::MAX.unsigned_abs() { 0 } else { ttl.into() })
}
