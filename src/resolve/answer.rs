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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_resolver::proto::op::{Message, OpCode};
    use hickory_resolver::proto::rr::Record as Entry;
    use hickory_resolver::proto::rr::rdata::{A, CNAME, SOA};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(format!("{text}.")).expect(text)
    }

    fn address(of: &str, last: u8, ttl: u32) -> Entry {
        Entry::from_rdata(name(of), ttl, RData::A(A(Ipv4Addr::new(10, 0, 0, last))))
    }

    fn alias(of: &str, to: &str, ttl: u32) -> Entry {
        Entry::from_rdata(name(of), ttl, RData::CNAME(CNAME(name(to))))
    }

    fn message(asked: &str, answers: Vec<Entry>) -> Message {
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(Query::query(name(asked), RecordType::A));
        message.answers = answers;
        message
    }

    fn read(message: &Message) -> Result<Answer, AnswerError> {
        super::read(message, "db.internal", Kind::Ipv4, &mut 0)
    }

    fn records(lasts: &[u8], life: u64) -> Result<Answer, AnswerError> {
        let addresses = lasts.iter().map(|last| Ipv4Addr::new(10, 0, 0, *last).into()).collect();
        Ok(Answer::Records { records: Records::Addresses(addresses), life: Duration::from_secs(life) })
    }

    #[test]
    fn another_question_is_not_answered() {
        let right = vec![address("db.internal", 1, 60)];
        assert_eq!(read(&message("DB.Internal", right.clone())), records(&[1], 60));
        assert_eq!(read(&message("other.internal", right.clone())), Err(AnswerError::Question));
        let mut none = message("db.internal", right.clone());
        none.queries.clear();
        assert_eq!(read(&none), Err(AnswerError::Question));
        let mut two = message("db.internal", right.clone());
        two.add_query(Query::query(name("db.internal"), RecordType::A));
        assert_eq!(read(&two), Err(AnswerError::Question));
        let kind = super::read(&message("db.internal", right), "db.internal", Kind::Ipv6, &mut 0);
        assert_eq!(kind, Err(AnswerError::Question));
    }

    #[test]
    fn only_own_records_in_the_answer_section_count_and_the_shortest_life_holds() {
        let answers = vec![
            address("other.internal", 9, 1),
            alias("db.internal", "There.internal", 50),
            address("there.internal", 2, 40),
            address("THERE.internal", 3, 30),
            alias("other.internal", "db.internal", 1),
        ];
        assert_eq!(read(&message("db.internal", answers.clone())), records(&[2, 3], 30));
        let mut elsewhere = message("db.internal", vec![]);
        elsewhere.additionals = vec![address("db.internal", 1, 60)];
        elsewhere.authorities = vec![address("db.internal", 1, 60)];
        let nothing = Ok(Answer::Nothing { exists: true, life: Duration::ZERO });
        assert_eq!(read(&elsewhere), nothing);
        assert_eq!(read(&message("db.internal", answers[..1].to_vec())), nothing);
        // A lifetime with the highest bit set is none.
        assert_eq!(read(&message("db.internal", vec![address("db.internal", 1, 1 << 31)])), records(&[1], 0));
    }

    #[test]
    fn aliases_are_followed_asked_on_for_and_bounded() {
        let on = read(&message("db.internal", vec![alias("db.internal", "there.internal", 9)]));
        assert_eq!(on, Ok(Answer::Alias { to: "there.internal".to_owned(), life: Duration::from_secs(9) }));
        let circle = vec![alias("db.internal", "there.internal", 9), alias("there.internal", "db.internal", 9)];
        assert_eq!(read(&message("db.internal", circle)), Err(AnswerError::Aliases));
        let mut followed = ALIASES_MAX;
        let one_more = message("db.internal", vec![alias("db.internal", "there.internal", 9)]);
        let more = super::read(&one_more, "db.internal", Kind::Ipv4, &mut followed);
        assert_eq!(more, Err(AnswerError::Aliases));
        // The zone says that there is nothing behind the alias.
        let mut gone = message("db.internal", vec![alias("db.internal", "there.internal", 9)]);
        gone.metadata.response_code = ResponseCode::NXDomain;
        assert_eq!(read(&gone), Ok(Answer::Nothing { exists: false, life: Duration::ZERO }));
        let soa = SOA::new(name("ns.internal"), name("admin.internal"), 1, 3_600, 600, 86_400, 20);
        gone.authorities = vec![Entry::from_rdata(name("internal"), 60, RData::SOA(soa))];
        assert_eq!(read(&gone), Ok(Answer::Nothing { exists: false, life: Duration::from_secs(9) }));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Among eight names, of which some are aliases of others: each address found belongs to a name that the aliases lead
        /// to, and no other does.
        #[test]
        fn what_is_found_is_where_the_aliases_lead(entries in prop::collection::vec((0..8_u8, 0..8_u8, any::<bool>()), 0..40)) {
            let of = |at: u8| if at == 0 { "db.internal".to_owned() } else { format!("n{at}.internal") };
            let answers: Vec<_> = entries
                .iter()
                .map(|&(owner, to, is_alias)| match is_alias {
                    true => alias(&of(owner), &of(to), 5),
                    false => address(&of(owner), owner, 5),
                })
                .collect();
            match read(&message("db.internal", answers)) {
                Ok(Answer::Records { records: Records::Addresses(found), .. }) => {
                    let mut at = 0;
                    while !entries.iter().any(|&(owner, _, is_alias)| owner == at && !is_alias) {
                        at = entries.iter().find(|(owner, _, _)| *owner == at).expect("an alias leads on").1;
                    }
                    let own = entries.iter().filter(|&&(owner, _, is_alias)| owner == at && !is_alias).count();
                    prop_assert_eq!(found, vec![IpAddr::from([10, 0, 0, at]); own.min(ADDRESSES_PER_NAME)]);
                }
                Ok(Answer::Alias { .. } | Answer::Nothing { exists: true, .. }) => {
                    prop_assert!(!entries.iter().any(|&(owner, _, is_alias)| owner == 0 && !is_alias));
                }
                other => prop_assert_eq!(other, Err(AnswerError::Aliases)),
            }
        }
    }
}
