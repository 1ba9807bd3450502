//! One wrong field is enough. At every door, and at an agent whose gateway lies, a request that is equal to a permitted one
//! in all but one field is refused; the side that refuses records why; nobody is dialled; and whoever asked is told one of
//! the fixed texts. Beside each such request the permitted one is made, and works.
//!
//! The cases are tables, one for each [`Door`]. [`every_door_has_a_case_for_every_field`] holds them against the doors that
//! `src/` has and the fields that a request has there; `kinds.rs` does the same for what SSH can ask for, and
//! [`every_reason_is_expected_somewhere`] for the reasons that registry and policy have.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use caponier::identity::PrivateKey;
use caponier::token::Claims;
use caponier::tunnel::wire::{ForwardId, RefusalCode};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::connect_door;
use crate::harness::{LISTENING, caponier, connect, echoes, eventually, free_port, run, within};
use crate::kinds;
use crate::raw::{GATEWAY_LINE, LOGIN_FAILURE, Peer};
use crate::yard::{Counted, Yard};

/// Where a request comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Door {
    /// `gateway/door/ssh.rs`.
    Ssh,
    /// `gateway/door/local.rs`.
    Local,
    /// `client.rs`: `caponier forward`, at the SSH door.
    Client,
    /// `agent/forward.rs`: an agent, from a gateway that may lie.
    Agent,
    /// `agent/listen.rs`: an agent's own listener.
    Listen,
    /// `gateway/door/connect.rs`.
    Connect,
}

/// What a request consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Field {
    Organisation,
    Agent,
    Principal,
    Key,
    User,
    Host,
    Port,
    /// An address where a name is granted, or the other way round, or in another form.
    Literal,
    /// What the name stands for.
    Resolved,
    /// Where it comes from.
    Source,
    Time,
    Door,
    /// The type of the channel that is asked for.
    Channel,
    /// The gateway's id of the forward.
    Forward,
    /// The client's address in the originator.
    Client,
    Control,
    /// The host key that is expected.
    Pin,
}

/// The fields that a request has at a door.
const APPLIES: &[(Door, &[Field])] = &[
    (
        Door::Ssh,
        &[
            Field::Organisation,
            Field::Agent,
            Field::Principal,
            Field::Key,
            Field::User,
            Field::Host,
            Field::Port,
            Field::Literal,
            Field::Resolved,
            Field::Source,
            Field::Time,
            Field::Door,
            Field::Channel,
            Field::Control,
        ],
    ),
    (
        Door::Local,
        &[
            Field::Organisation,
            Field::Agent,
            Field::Principal,
            Field::Host,
            Field::Port,
            Field::Literal,
            Field::Resolved,
            Field::Source,
            Field::Time,
        ],
    ),
    (
        Door::Client,
        &[
            Field::Organisation,
            Field::Agent,
            Field::Principal,
            Field::Key,
            Field::Host,
            Field::Port,
            Field::Literal,
            Field::Resolved,
            Field::Source,
            Field::Time,
            Field::Pin,
        ],
    ),
    (
        Door::Agent,
        &[
            Field::Organisation,
            Field::Principal,
            Field::Key,
            Field::User,
            Field::Host,
            Field::Port,
            Field::Literal,
            Field::Resolved,
            Field::Time,
            Field::Channel,
            Field::Forward,
            Field::Client,
            Field::Control,
        ],
    ),
    (
        Door::Listen,
        &[
            Field::Organisation,
            Field::Principal,
            Field::Key,
            Field::User,
            Field::Host,
            Field::Port,
            Field::Literal,
            Field::Resolved,
            Field::Source,
            Field::Time,
            Field::Door,
            Field::Channel,
            Field::Control,
        ],
    ),
    (
        Door::Connect,
        &[
            Field::Organisation,
            Field::Agent,
            Field::Principal,
            Field::Key,
            Field::User,
            Field::Host,
            Field::Port,
            Field::Literal,
            Field::Resolved,
            Field::Source,
            Field::Time,
            Field::Channel,
        ],
    ),
];

/// The targets' ports. All of them are listened on, on 127.0.0.1; the first on 127.0.0.2 too.
#[derive(Debug, Clone, Copy, Default)]
struct Ports {
    /// Allowed by address, to `provisioner` and `narrow`.
    echo: u16,
    /// Allowed by the name localhost.
    named: u16,
    /// Allowed by the name localhost, within a network that it does not lie in.
    outside: u16,
    /// Allowed by address, to others.
    others: u16,
    /// In no rule.
    closed: u16,
    /// Allowed by address to `provisioner`, by a rule of another organisation.
    theirs: u16,
    /// Allowed by address, from a day that is far away.
    early: u16,
    /// Allowed by address, until a day that has been.
    late: u16,
    /// Allowed by address and by name, and denied by address.
    denied: u16,
}

/// A request: the permitted one, until a case changes it.
#[derive(Debug, Clone)]
struct Ask {
    ports: Ports,
    organisation: &'static str,
    agent: &'static str,
    /// The user at the login, where it is not what the door takes.
    user: Option<&'static str>,
    principal: &'static str,
    key: &'static str,
    /// The address that it comes from, where that is not one of those for everybody.
    source: Option<&'static str>,
    /// Anything else about the login, for `raw.py`.
    login: Value,
    host: String,
    port: u16,
    /// The type of channel.
    channel: &'static str,
    /// The form of the originator; ID, WHO and WHENCE in it are replaced.
    originator: &'static str,
    forward: Option<String>,
    client: &'static str,
    pin: &'static str,
    /// The identification string.
    line: Option<&'static str>,
}

impl Ask {
    fn permitted(ports: Ports) -> Self {
        Self {
            ports,
            organisation: "acme",
            agent: "prod-eu",
            user: None,
            principal: "provisioner",
            key: "provisioner",
            source: None,
            login: json!({}),
            host: "127.0.0.1".to_owned(),
            port: ports.echo,
            channel: "direct-tcpip",
            originator: "caponier1:ID:WHO:WHENCE",
            forward: None,
            client: "192.0.2.1:40000",
            pin: "gateway",
            line: None,
        }
    }

    /// The permitted request by name.
    fn by_name(ports: Ports) -> Self {
        Self { host: "localhost".to_owned(), port: ports.named, ..Self::permitted(ports) }
    }

    /// As an orchestrator asks at an agent's own listener, with a key that speaks for itself.
    fn directly(ports: Ports) -> Self {
        Self { key: "direct", originator: "127.0.0.1", ..Self::permitted(ports) }
    }

    /// As a client of the CONNECT door asks, with a token by a key that signs for principals.
    fn with_token(ports: Ports) -> Self {
        Self { key: "tokens", channel: "CONNECT", ..Self::permitted(ports) }
    }

    /// Its token: by the principal's own key where it is that which signs, unless the case says otherwise.
    fn token(&self, yard: &Yard) -> String {
        let key = PrivateKey::read(&yard.key(self.key)).expect("a key");
        let (principal, agent) = (self.principal.parse().expect("an id"), self.name().parse().expect("a name"));
        let begins = Timestamp::now() + SignedDuration::from_hours(self.login["begins_in"].as_i64().unwrap_or(0));
        let claims = Claims::new(principal, agent, None, begins, SignedDuration::from_hours(1)).expect("claims");
        let own = self.key == self.principal && self.login["form"] != "jwt";
        let token = if own { claims.sign_with_ssh(&key) } else { claims.sign(&key) };
        token.expect("a token").text().expose().clone()
    }

    /// The request, with its token as the password of a user, or as the case says.
    fn request(&self, yard: &Yard) -> String {
        let user = self.user.unwrap_or("caponier");
        let password = BASE64_STANDARD.encode(format!("{user}:{}", self.token(yard)));
        let authorization = match self.login["authorization"].as_str() {
            Some(other) => other.replace("TOKEN", &self.token(yard)),
            None => format!("Proxy-Authorization: Basic {password}\r\n"),
        };
        let host = if self.host.contains("::") { format!("[{}]", self.host) } else { self.host.clone() };
        let target = format!("{host}:{}", self.port);
        let method = self.channel;
        format!("{method} {target} HTTP/1.1\r\nHost: gateway\r\n{authorization}\r\n")
    }

    /// As a gateway asks an agent.
    fn from_gateway(ports: Ports) -> Self {
        Self { key: "login-acme", ..Self::permitted(ports) }
    }

    fn name(&self) -> String {
        format!("{}/{}", self.organisation, self.agent)
    }

    fn target(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    fn login(&self, yard: &Yard, user: &str) -> Value {
        let mut login = self.login.clone();
        login["do"] = "login".into();
        login["user"] = self.user.unwrap_or(user).into();
        login["key"] = json!(yard.key(self.key));
        if let Some(file) = self.login["certificate"].as_str() {
            login["certificate"] = json!(yard.path(file));
        }
        login
    }

    fn originator(&self) -> String {
        let id = self.forward.clone().unwrap_or_else(|| ForwardId::random().to_string());
        self.originator.replace("ID", &id).replace("WHO", self.principal).replace("WHENCE", self.client)
    }

    fn open(&self) -> Value {
        let mut open = json!({"do": "open", "type": self.channel, "within": 25});
        let foreign = kinds::channels(self.port, Path::new("/nonexistent"));
        if let Some((_, body)) = foreign.into_iter().find(|(kind, _)| *kind == self.channel) {
            open["rest"] = body.into();
            return open;
        }
        if self.channel.to_lowercase().starts_with("direct-tcpip") {
            open["host"] = json!(self.host);
            open["port"] = self.port.into();
        }
        open
    }
}

/// Which side refuses, with the reason that its trail gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// At the login.
    Login(&'static str),
    /// When it is opened.
    Gateway(&'static str),
    Agent(&'static str),
    /// On the wire alone: it is not even a request for a forward, and no side makes an entry of it.
    Wire,
}

/// What is changed, in words and in the request, and who refuses it.
struct Case(Field, &'static str, fn(&mut Ask), By);

/// Cases of the target, which are the same at every door.
fn targets() -> Vec<Case> {
    use By::{Agent, Gateway};
    vec![
        Case(Field::Host, "another address", |ask| ask.host = "127.0.0.2".into(), Agent("no_rule")),
        Case(Field::Host, "another name", |ask| ask.host = "localhost.example".into(), Agent("no_rule")),
        Case(Field::Port, "a port without a rule", |ask| ask.port = ask.ports.closed, Agent("port")),
        Case(Field::Port, "a port of another's rule", |ask| ask.port = ask.ports.others, Agent("principal")),
        Case(Field::Port, "a port of another organisation's rule", |ask| ask.port = ask.ports.theirs, Agent("port")),
        Case(Field::Literal, "a name for the address", |ask| ask.host = "localhost".into(), Agent("port")),
        Case(Field::Literal, "an address for the name", |ask| ask.port = ask.ports.named, Agent("port")),
        Case(
            Field::Resolved,
            "a name that stands for another address than it may",
            |ask| (ask.host, ask.port) = ("localhost".into(), ask.ports.outside),
            Agent("outside_within"),
        ),
        Case(Field::Port, "a port that a rule denies", |ask| ask.port = ask.ports.denied, Agent("deny_rule")),
        Case(
            Field::Resolved,
            "a name that stands for what a rule denies",
            |ask| (ask.host, ask.port) = ("localhost".into(), ask.ports.denied),
            Agent("deny_rule"),
        ),
        Case(Field::Time, "a rule that is not good yet", |ask| ask.port = ask.ports.early, Agent("not_yet_valid")),
        Case(Field::Time, "a rule that is good no more", |ask| ask.port = ask.ports.late, Agent("expired")),
        Case(
            Field::Principal,
            "a principal with fewer targets",
            |ask| (ask.principal, ask.key, ask.port) = ("narrow", "narrow", ask.ports.closed),
            Gateway("target_not_granted"),
        ),
    ]
}

/// Cases of the target that only a peer who writes the bytes himself can ask for.
fn forms() -> Vec<Case> {
    use By::{Agent, Gateway};
    vec![
        Case(Field::Literal, "octal", |ask| ask.host = "0177.0.0.1".into(), Gateway("malformed_target")),
        Case(Field::Literal, "decimal", |ask| ask.host = "2130706433".into(), Gateway("malformed_target")),
        Case(Field::Literal, "hexadecimal", |ask| ask.host = "0x7f.1".into(), Gateway("malformed_target")),
        Case(Field::Literal, "short", |ask| ask.host = "127.1".into(), Gateway("malformed_target")),
        Case(Field::Literal, "a zone", |ask| ask.host = "127.0.0.1%lo".into(), Gateway("malformed_target")),
        Case(Field::Literal, "brackets", |ask| ask.host = "[127.0.0.1]".into(), Gateway("malformed_target")),
        Case(Field::Literal, "percent-encoded", |ask| ask.host = "127%2e0.0.1".into(), Gateway("malformed_target")),
        Case(Field::Literal, "NAT64", |ask| ask.host = "64:ff9b::7f00:2".into(), Agent("no_rule")),
        Case(Field::Host, "NUL", |ask| ask.host = "127.0.0.1\0".into(), Gateway("malformed_target")),
        Case(Field::Host, "256 bytes", |ask| ask.host = "a.".repeat(128), Gateway("malformed_target")),
        Case(Field::Host, "a blank", |ask| ask.host = "127.0.0.1 ".into(), Gateway("malformed_target")),
        Case(Field::Port, "port 0", |ask| ask.port = 0, Gateway("malformed_target")),
    ]
}

/// What is asked of either end but a forward.
fn channels() -> Vec<Case> {
    vec![
        Case(Field::Channel, "the way back", |ask| ask.channel = "forwarded-tcpip", By::Wire),
        Case(Field::Channel, "an unknown type", |ask| ask.channel = "direct-tcpip@example.com", By::Wire),
        Case(Field::Channel, "the type in capitals", |ask| ask.channel = "DIRECT-TCPIP", By::Wire),
        Case(Field::Channel, "a socket", |ask| ask.channel = "direct-streamlocal@openssh.com", By::Wire),
        Case(Field::Control, "a session channel", |ask| ask.channel = "session", By::Wire),
    ]
}

/// Cases of the login with the stock client's means.
fn logins() -> Vec<Case> {
    use By::Login;
    vec![
        Case(
            Field::Organisation,
            "another organisation",
            |ask| ask.organisation = "globex",
            Login("other_organisation"),
        ),
        Case(Field::Organisation, "nobody", |ask| ask.organisation = "initech", Login("unknown_organisation")),
        Case(Field::Agent, "an agent that is not granted", |ask| ask.agent = "stage-eu", Login("not_granted")),
        Case(Field::Agent, "an agent that does not exist", |ask| ask.agent = "prod-xx", Login("unknown_agent")),
        Case(Field::Principal, "another's grant", |ask| ask.key = "bystander", Login("not_granted")),
        Case(Field::Principal, "another organisation's", |ask| ask.key = "deployer", Login("other_organisation")),
        Case(Field::Key, "a stranger's", |ask| ask.key = "stranger", Login("unknown_key")),
        Case(Field::Key, "revoked", |ask| ask.key = "withdrawn", Login("revoked")),
        Case(Field::Key, "the gateway's login key", |ask| ask.key = "login-acme", Login("unknown_key")),
        Case(Field::Key, "the gateway's own", |ask| ask.key = "gateway", Login("unknown_key")),
        Case(Field::Source, "a principal from elsewhere", |ask| ask.key = "elsewhere", Login("source_network")),
        Case(Field::Time, "the key is not good yet", |ask| ask.key = "early", Login("not_yet_valid")),
        Case(Field::Time, "the key has expired", |ask| ask.key = "lapsed", Login("expired")),
        Case(Field::Time, "the principal has expired", |ask| ask.key = "former", Login("expired")),
        Case(Field::Time, "the principal does not exist yet", |ask| ask.key = "upcoming", Login("not_yet_valid")),
    ]
}

fn cases(door: Door) -> Vec<Case> {
    use By::{Agent, Gateway, Login};
    let mut cases = Vec::new();
    match door {
        Door::Ssh => {
            cases.extend(logins());
            cases.extend([
                // The library asks for the bare key first: of one that is registered, the certificate is refused.
                Case(
                    Field::Key,
                    "a certificate of the key, where the listener takes none",
                    |ask| ask.login = json!({"certificate": "certificate-of-ours"}),
                    Login("certificate_not_accepted"),
                ),
                Case(
                    Field::Key,
                    "a certificate of another key, where the listener takes none",
                    |ask| (ask.key, ask.login) = ("certified", json!({"certificate": "certificate-of-another"})),
                    Login("unknown_key"),
                ),
                Case(Field::Source, "elsewhere", |ask| ask.source = Some("127.9.0.1"), Login("source_network")),
                Case(Field::Door, "an agent's key", |ask| ask.key = "agent", Login("other_holder")),
                Case(Field::User, "a replica too", |ask| ask.user = Some("acme/prod-eu/one"), Login("malformed_user")),
                Case(Field::User, "capitals", |ask| ask.user = Some("ACME/prod-eu"), Login("malformed_user")),
                Case(Field::User, "the agent alone", |ask| ask.user = Some("prod-eu"), Login("malformed_user")),
                Case(Field::User, "the organisation alone", |ask| ask.user = Some("acme"), Login("malformed_user")),
                Case(Field::User, "a trailing dot", |ask| ask.user = Some("acme/prod-eu."), Login("malformed_user")),
                Case(Field::User, "NUL at its end", |ask| ask.user = Some("acme/prod-eu\0"), Login("malformed_user")),
                Case(
                    Field::Key,
                    "a signature of something else",
                    |ask| ask.login = json!({"forge": true}),
                    Login("left_before_login"),
                ),
                Case(Field::Channel, "another service", |ask| ask.login = json!({"service": "sftp"}), Login("")),
            ]);
            cases.extend(targets());
            cases.extend(forms());
            cases.extend(channels());
        }
        Door::Local => {
            cases.extend(targets());
            cases.extend([
                Case(
                    Field::Organisation,
                    "another organisation",
                    |ask| ask.organisation = "globex",
                    Gateway("not_registered"),
                ),
                Case(Field::Agent, "not granted", |ask| ask.agent = "stage-eu", Gateway("agent_not_granted")),
                Case(Field::Agent, "does not exist", |ask| ask.agent = "prod-xx", Gateway("not_registered")),
                Case(
                    Field::Principal,
                    "another's grant",
                    |ask| ask.principal = "bystander",
                    Gateway("agent_not_granted"),
                ),
                Case(Field::Principal, "nobody", |ask| ask.principal = "nobody", Gateway("not_registered")),
                Case(
                    Field::Principal,
                    "another organisation's",
                    |ask| ask.principal = "deployer",
                    Gateway("not_registered"),
                ),
                Case(
                    Field::Source,
                    "a principal from elsewhere",
                    |ask| ask.principal = "elsewhere",
                    Gateway("source_network"),
                ),
                Case(Field::Time, "expired", |ask| ask.principal = "former", Gateway("principal_expired")),
                Case(Field::Time, "not yet", |ask| ask.principal = "upcoming", Gateway("not_yet_valid")),
            ]);
        }
        Door::Client => {
            cases.extend(logins());
            cases.extend(targets());
            cases.push(Case(Field::Pin, "another gateway", |ask| ask.pin = "stranger", By::Wire));
            // It takes the organisation's keys only, like the stock client; what it asks for is bound to one session.
            cases.retain(|Case(field, _, _, by)| *field != Field::Principal || matches!(by, Login(_)));
        }
        Door::Agent => {
            cases.extend(targets());
            cases.retain(|Case(_, _, _, by)| matches!(by, Agent(_)));
            cases.extend(forms().into_iter().map(|Case(field, what, change, by)| {
                let By::Gateway(reason) = by else { return Case(field, what, change, by) };
                Case(field, what, change, Agent(reason))
            }));
            cases.extend(channels());
            cases.extend([
                Case(
                    Field::Organisation,
                    "another organisation, by the same key",
                    |ask| ask.organisation = "globex",
                    Login("other_organisation"),
                ),
                Case(
                    Field::Time,
                    "a login key that is not good yet",
                    |ask| ask.key = "direct-early",
                    Login("not_yet_valid"),
                ),
                Case(Field::Time, "a login key that is good no more", |ask| ask.key = "direct-late", Login("expired")),
                Case(Field::Key, "another organisation's", |ask| ask.key = "login-globex", Login("unknown_key")),
                Case(Field::Key, "a principal's", |ask| ask.key = "provisioner", Login("unknown_key")),
                Case(Field::Key, "its own", |ask| ask.key = "agent", Login("unknown_key")),
                Case(Field::User, "a door's", |ask| ask.user = Some("acme/prod-eu"), Login("other_organisation")),
                Case(Field::User, "capitals", |ask| ask.user = Some("ACME"), Login("other_organisation")),
                Case(
                    Field::Principal,
                    "not asserted",
                    |ask| ask.principal = "deployer",
                    Agent("principal_not_asserted"),
                ),
                Case(
                    Field::Principal,
                    "a longer name",
                    |ask| ask.principal = "provisioner2",
                    Agent("principal_not_asserted"),
                ),
                Case(Field::Principal, "not in the rule", |ask| ask.principal = "bystander", Agent("principal")),
                Case(Field::Principal, "none", |ask| ask.originator = "127.0.0.1", Agent("principal_missing")),
                Case(Field::Principal, "no text", |ask| ask.principal = "", Agent("malformed_originator")),
                Case(Field::Principal, "a pattern", |ask| ask.principal = "provision*", Agent("malformed_originator")),
                Case(
                    Field::Forward,
                    "a short id",
                    |ask| ask.forward = Some("00".into()),
                    Agent("malformed_originator"),
                ),
                Case(Field::Forward, "no id", |ask| ask.forward = Some(String::new()), Agent("malformed_originator")),
                Case(Field::Forward, "a live one", |ask| ask.forward = Some("LIVE".into()), Agent("duplicate_forward")),
                Case(Field::Client, "two words", |ask| ask.client = "192.0.2.1 x", Agent("malformed_originator")),
                Case(Field::Client, "active", |ask| ask.client = "\u{1b}[2J", Agent("malformed_originator")),
                Case(Field::Client, "none", |ask| ask.originator = "caponier1:ID:WHO", Agent("malformed_originator")),
                Case(
                    Field::Client,
                    "another version",
                    |ask| ask.originator = "caponier2:ID:WHO:WHENCE",
                    Agent("malformed_originator"),
                ),
            ]);
        }
        Door::Listen => {
            cases.extend(targets().into_iter().chain(forms()).filter_map(|Case(field, what, change, by)| match by {
                Agent(_) => Some(Case(field, what, change, by)),
                Gateway(reason @ "malformed_target") => Some(Case(field, what, change, Agent(reason))),
                _ => None,
            }));
            cases.extend(channels());
            cases.extend([
                Case(Field::Organisation, "another", |ask| ask.organisation = "globex", Login("other_organisation")),
                Case(Field::Organisation, "none", |ask| ask.organisation = "initech", Login("unknown_organisation")),
                Case(Field::User, "an agent's name", |ask| ask.user = Some("acme/prod-eu"), Login("malformed_user")),
                Case(Field::User, "capitals", |ask| ask.user = Some("ACME"), Login("malformed_user")),
                Case(Field::User, "nobody", |ask| ask.user = Some(""), Login("malformed_user")),
                Case(Field::Key, "a stranger's", |ask| ask.key = "stranger", Login("unknown_key")),
                Case(Field::Key, "a principal's", |ask| ask.key = "provisioner", Login("unknown_key")),
                Case(Field::Key, "its own", |ask| ask.key = "agent", Login("unknown_key")),
                Case(Field::Key, "another's", |ask| ask.key = "login-globex", Login("other_organisation")),
                Case(
                    Field::Key,
                    "a signature of something else",
                    |ask| ask.login = json!({"forge": true}),
                    Login("left_before_login"),
                ),
                Case(Field::Time, "a key that is not good yet", |ask| ask.key = "direct-early", Login("not_yet_valid")),
                Case(Field::Time, "a key that is good no more", |ask| ask.key = "direct-late", Login("expired")),
                Case(Field::Source, "elsewhere", |ask| ask.source = Some("127.9.0.1"), Login("source_network")),
                Case(
                    Field::Door,
                    "an agent's line",
                    |ask| ask.line = Some("SSH-2.0-caponier_1 agent=acme/prod-eu/x"),
                    Login("is_an_agent"),
                ),
                Case(
                    Field::Principal,
                    "a claim of a key that asserts nobody",
                    |ask| ask.originator = "caponier1:ID:WHO:WHENCE",
                    Agent("principal_not_asserted"),
                ),
                Case(
                    Field::Principal,
                    "no claim of a key that asserts",
                    |ask| ask.key = "login-acme",
                    Agent("principal_missing"),
                ),
            ]);
        }
        Door::Connect => {
            cases.extend(targets());
            cases.extend(forms().into_iter().map(|case| match case.1 {
                // No line of a request has such characters.
                "NUL" | "a blank" => Case(case.0, case.1, case.2, By::Wire),
                _ => case,
            }));
            cases.extend([
                Case(Field::Channel, "another method", |ask| ask.channel = "GET", By::Wire),
                Case(Field::Channel, "one with a body", |ask| ask.channel = "POST", By::Wire),
                Case(
                    Field::Organisation,
                    "another organisation",
                    |ask| ask.organisation = "globex",
                    Login("other_organisation"),
                ),
                Case(Field::Organisation, "nobody", |ask| ask.organisation = "initech", Login("unknown_organisation")),
                Case(Field::Agent, "an agent that is not granted", |ask| ask.agent = "stage-eu", Login("not_granted")),
                Case(Field::Agent, "an agent that does not exist", |ask| ask.agent = "prod-xx", Login("unknown_agent")),
                Case(Field::Principal, "another's grant", |ask| ask.principal = "bystander", Login("not_granted")),
                Case(Field::Principal, "does not exist", |ask| ask.principal = "deployer", Login("not_granted")),
                Case(Field::Principal, "not its key's", |ask| ask.principal = "certified", Login("token_principal")),
                Case(Field::Key, "a stranger's", |ask| ask.key = "stranger", Login("unknown_key")),
                Case(Field::Key, "an agent's", |ask| ask.key = "agent", Login("unknown_key")),
                Case(Field::Key, "the gateway's own", |ask| ask.key = "gateway", Login("unknown_key")),
                Case(Field::Key, "a CA's", |ask| ask.key = "authority", Login("unknown_key")),
                Case(Field::Key, "another organisation's", |ask| ask.key = "tokens-globex", Login("other_organisation")),
                Case(Field::Key, "revoked", |ask| ask.key = "tokens-withdrawn", Login("revoked")),
                Case(
                    Field::Key,
                    "the principal's own, as if it signed for others",
                    |ask| (ask.key, ask.login) = ("provisioner", json!({"form": "jwt"})),
                    Login("other_holder"),
                ),
                Case(
                    Field::Key,
                    "two tokens",
                    |ask| ask.login = json!({"authorization": "Proxy-Authorization: Bearer TOKEN\r\nProxy-Authorization: Bearer TOKEN\r\n"}),
                    Login("token_malformed"),
                ),
                Case(Field::Key, "none", |ask| ask.login = json!({"authorization": ""}), Login("token_missing")),
                Case(
                    Field::Key,
                    "for the origin and not for the proxy",
                    |ask| ask.login = json!({"authorization": "Authorization: Bearer TOKEN\r\n"}),
                    Login("token_missing"),
                ),
                Case(
                    Field::Key,
                    "an altered token",
                    |ask| ask.login = json!({"authorization": "Proxy-Authorization: Bearer TOKENA\r\n"}),
                    Login("token_signature"),
                ),
                Case(
                    Field::Key,
                    "a token that says too much of its key",
                    |ask| ask.login = json!({"authorization": format!("Proxy-Authorization: Bearer {EMBEDDED}\r\n")}),
                    Login("token_header"),
                ),
                Case(
                    Field::Agent,
                    "another than the token's",
                    |ask| {
                        ask.login = json!({"authorization": "Proxy-Authorization: Bearer TOKEN\r\nCaponier-Agent: acme/stage-eu\r\n"});
                    },
                    Login("token_agent"),
                ),
                Case(Field::User, "another user", |ask| ask.user = Some("admin"), Login("token_malformed")),
                Case(Field::User, "capitals", |ask| ask.user = Some("Caponier"), Login("token_malformed")),
                Case(Field::User, "nobody", |ask| ask.user = Some(""), Login("token_malformed")),
                Case(Field::Source, "a principal from elsewhere", |ask| ask.principal = "elsewhere", Login("source_network")),
                Case(Field::Time, "the key is not good yet", |ask| ask.key = "tokens-early", Login("not_yet_valid")),
                Case(Field::Time, "the key has expired", |ask| ask.key = "tokens-lapsed", Login("expired")),
                Case(Field::Time, "the principal has expired", |ask| ask.principal = "former", Login("expired")),
                Case(Field::Time, "the principal does not exist yet", |ask| ask.principal = "upcoming", Login("not_yet_valid")),
                Case(
                    Field::Time,
                    "the token is not good yet",
                    |ask| ask.login = json!({"begins_in": 1}),
                    Login("token_not_yet_valid"),
                ),
                Case(Field::Time, "the token has expired", |ask| ask.login = json!({"begins_in": -2}), Login("token_expired")),
            ]);
        }
    }
    cases
}

/// The header of a JWT that brings its own key, `{"alg":"EdDSA","typ":"caponier+jwt","kid":"","jwk":{}}`, and two parts more.
const EMBEDDED: &str = "eyJhbGciOiJFZERTQSIsInR5cCI6ImNhcG9uaWVyK2p3dCIsImtpZCI6IiIsImp3ayI6e319.e30.AAAA";

// ---------------------------------------------------------------------------------------------------------------------
// The world.

struct World {
    yard: Yard,
    counted: Counted,
    ports: Ports,
    /// The gateway, and its loopback doors in their order.
    door: SocketAddr,
    doors: Vec<SocketAddr>,
    /// Whether the agent has a listener of its own.
    listens: bool,
    faults: Vec<String>,
}

impl World {
    /// Keys, a registry and targets.
    async fn new() -> Self {
        let yard = Yard::new();
        for key in ["gateway", "login-acme", "login-globex", "direct", "direct-early", "direct-late"] {
            yard.key(key);
        }
        for (whose, key) in [
            ("acme/agents/prod-eu", "agent"),
            ("acme/agents/stage-eu", "agent-stage"),
            ("acme/principals/provisioner", "provisioner"),
            ("acme/principals/provisioner", "lapsed"),
            ("acme/principals/provisioner", "withdrawn"),
            ("acme/principals/provisioner", "early"),
            ("globex/agents/prod-eu", "agent-globex"),
        ] {
            yard.register(whose, key);
        }
        let registry = yard.registry();
        registry.about_key("acme/principals/provisioner", "lapsed", "expires = \"2020-01-01T00:00:00Z\"");
        registry.about_key("acme/principals/provisioner", "early", "not_before = \"2099-01-01T00:00:00Z\"");
        registry.about_key("acme/principals/provisioner", "withdrawn", "revoked = true");
        registry.about("acme/principals/provisioner", "agents = [\"prod-*\"]\naccept_from = [\"127.0.0.0/16\"]");
        for (whose, key, toml) in [
            ("acme/principals/bystander", "bystander", "agents = [\"stage-*\"]"),
            ("acme/principals/former", "former", "agents = [\"prod-*\"]\nexpires = \"2020-01-01T00:00:00Z\""),
            ("acme/principals/upcoming", "upcoming", "agents = [\"prod-*\"]\nnot_before = \"2099-01-01T00:00:00Z\""),
            ("acme/principals/elsewhere", "elsewhere", "agents = [\"prod-*\"]\naccept_from = [\"192.0.2.0/24\"]"),
            ("globex/principals/deployer", "deployer", "agents = [\"*\"]"),
        ] {
            yard.principal(whose, key, toml);
        }
        let authority = yard.key("authority");
        registry.key("acme/user-ca", "authority", &yard.public("authority"));
        registry.about("acme/user-ca/authority", "principals = [\"*\"]");
        for (key, file) in [("provisioner", "certificate-of-ours"), ("certified", "certificate-of-another")] {
            let public = yard.key(key).with_extension("pub");
            let mut sign = Command::new("ssh-keygen");
            sign.args(["-q", "-I", key, "-n", "provisioner", "-s"]).arg(&authority).arg(public);
            run(&mut sign).await.done();
            // Elsewhere, or the stock client would show it of its own accord.
            fs::rename(yard.path(&format!("{key}-cert.pub")), yard.path(file)).expect("moved");
        }
        for (folder, key, toml) in [
            ("acme", "tokens", ""),
            ("acme", "tokens-withdrawn", "revoked = true"),
            ("acme", "tokens-early", "not_before = \"2099-01-01T00:00:00Z\""),
            ("acme", "tokens-lapsed", "expires = \"2020-01-01T00:00:00Z\""),
            ("globex", "tokens-globex", ""),
        ] {
            let whose = format!("{folder}/token-keys");
            yard.register(&whose, key);
            let named = ["provisioner", "narrow", "bystander", "former", "upcoming", "elsewhere", "deployer"];
            registry.about_key(&whose, key, &format!("principals = {named:?}\n{toml}"));
        }
        let counted = Counted::new();
        let mut ports = [0; 9];
        for port in &mut ports {
            *port = counted.listen("127.0.0.1", free_port()).await;
        }
        let [echo, named, outside, others, closed, theirs, early, late, denied] = ports;
        counted.listen("127.0.0.2", echo).await;
        let ports = Ports { echo, named, outside, others, closed, theirs, early, late, denied };
        yard.principal(
            "acme/principals/narrow",
            "narrow",
            &format!("agents = [\"prod-*\"]\ntargets = [\"127.0.0.1:{echo}\"]"),
        );
        let (door, doors) = (SocketAddr::from(([127, 0, 0, 1], 0)), Vec::new());
        Self { yard, counted, ports, door, doors, listens: false, faults: Vec::new() }
    }

    /// A gateway without loopback doors, and an agent that is linked to it.
    async fn linked() -> Self {
        let mut world = Self::new().await;
        world.start_gateway(&[]).await;
        world
    }

    /// A gateway with these loopback doors, and an agent that is linked to it.
    async fn start_gateway(&mut self, locals: &[Ask]) {
        let mut config = "[gateway]\nlisten = [\"127.0.0.1:0\"]\nhost_key = \"gateway\"\nregistry = \"keys\"\n\
             [audit]\nfile = \"gateway.jsonl\"\n\
             [[organisation]]\nid = \"acme\"\nlogin_key = \"login-acme\"\n\
             [[organisation]]\nid = \"globex\"\nlogin_key = \"login-globex\"\n"
            .to_owned();
        for ask in locals {
            config.push_str(&format!(
                "[[local]]\nlisten = \"127.0.0.1:0\"\nagent = \"{}\"\ntarget = \"{}\"\nprincipal = \"{}\"\n",
                ask.name(),
                ask.target(),
                ask.principal
            ));
        }
        (self.door, self.doors) = self.yard.gateway("gateway", &config).await;
        let gateway = format!("\"ssh://127.0.0.1:{}\"", self.door.port());
        self.start_agent(&gateway, "\"ssh://127.0.0.1:9\"").await;
        self.yard.links("gateway", 1).await;
    }

    /// The agent, with these gateways for its organisations.
    async fn start_agent(&mut self, acme: &str, globex: &str) {
        let Ports { echo, named, outside, others, theirs, early, late, denied, .. } = self.ports;
        let config = format!(
            "[agent]\nid = \"prod-eu\"\nreplica = \"one\"\nhost_key = \"agent\"\n\
             [audit]\nfile = \"agent.jsonl\"\n{}\
             [[organisation]]\nid = \"acme\"\ngateways = [{acme}]\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\n\
             asserts = [\"provisioner\", \"narrow\", \"bystander\"]\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nnot_before = \"2099-01-01T00:00:00Z\"\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nexpires = \"2020-01-01T00:00:00Z\"\n\
             [[organisation.allow]]\nname = \"echo\"\naddresses = [\"127.0.0.1/32\"]\nports = [{echo}]\n\
             principals = [\"provisioner\", \"narrow\", \"{}\"]\n\
             [[organisation.allow]]\nname = \"named\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.1/32\"]\n\
             ports = [{named}]\n\
             [[organisation.allow]]\nname = \"outside\"\nhosts = [\"localhost\"]\nwithin = [\"10.0.0.0/8\"]\n\
             ports = [{outside}]\n\
             [[organisation.allow]]\nname = \"others\"\naddresses = [\"127.0.0.1/32\"]\nports = [{others}]\n\
             principals = [\"ci-*\"]\n\
             [[organisation.allow]]\nname = \"but\"\naddresses = [\"127.0.0.1/32\"]\nports = [{denied}]\n\
             [[organisation.allow]]\nname = \"but-named\"\nhosts = [\"localhost\"]\nwithin = [\"127.0.0.1/32\"]\n\
             ports = [{denied}]\n\
             [[organisation.deny]]\nname = \"denied\"\naddresses = [\"127.0.0.1/32\"]\nports = [{denied}]\n\
             [[organisation.allow]]\nname = \"early\"\naddresses = [\"127.0.0.1/32\"]\nports = [{early}]\n\
             not_before = \"2099-01-01T00:00:00Z\"\n\
             [[organisation.allow]]\nname = \"late\"\naddresses = [\"127.0.0.1/32\"]\nports = [{late}]\n\
             expires = \"2020-01-01T00:00:00Z\"\n\
             [[organisation]]\nid = \"globex\"\ngateways = [{globex}]\n\
             [[organisation.orchestrator]]\nkey = \"{}\"\nasserts = [\"*\"]\n\
             [[organisation.allow]]\nname = \"theirs\"\naddresses = [\"127.0.0.1/32\"]\nports = [{theirs}]\n",
            if self.listens { "[listen]\naddress = \"127.0.0.1:0\"\naccept_from = [\"127.0.0.0/16\"]\n" } else { "" },
            self.yard.public("login-acme"),
            self.yard.public("direct"),
            self.yard.public("direct-early"),
            self.yard.public("direct-late"),
            self.yard.fingerprint("direct"),
            self.yard.public("login-globex"),
        );
        self.yard.agent("agent", &config).await;
    }

    fn fault(&mut self, case: &Case, what: impl std::fmt::Display) {
        let Case(field, words, ..) = case;
        self.faults.push(format!("{field:?}, {words}: {what}"));
    }

    /// How long the trails are, and how many connections the targets have had.
    fn mark(&self) -> (usize, usize, usize) {
        (self.yard.trail("gateway").len(), self.yard.trail("agent").len(), self.counted.count())
    }

    /// Checks what became of a forward that was refused, and that nobody was dialled for it.
    async fn expect_denied(&mut self, case: &Case, ask: &Ask, mark: (usize, usize, usize)) {
        let (gateway, agent, count) = mark;
        let denied = |it: &Value| it["event"] == "forward.denied";
        let own = match case.3 {
            By::Gateway(reason) | By::Agent(reason) => reason,
            By::Login(_) | By::Wire => return,
        };
        // The gateway has made its record when it answers, and the agent before that.
        let record = self.yard.entry("gateway", gateway, case.1, denied).await;
        let by_agent = matches!(case.3, By::Agent(_));
        let (reason, detail) = (&record["reason"], &record["detail"]);
        if by_agent && (*reason != "agent_denied" || !detail.as_str().is_some_and(|it| it.contains(own))) {
            self.fault(case, &record);
        }
        if !by_agent && *reason != own {
            self.fault(case, &record);
        }
        let whose = [("organisation", ask.organisation), ("agent", ask.agent), ("principal", ask.principal)];
        if whose.iter().any(|(field, value)| record[field] != *value) {
            self.fault(case, format!("not whose it was: {record}"));
        }
        let trail = self.yard.trail("agent").split_off(agent);
        // The end of what was permitted before may come in between.
        let begins = |it: &&Value| {
            ["forward.denied", "forward.open", "forward.failed"].iter().any(|event| it["event"] == *event)
        };
        let of_agent: Vec<&Value> = trail.iter().filter(begins).collect();
        match of_agent[..] {
            [] if !by_agent => {}
            [one] if by_agent && denied(one) && one["reason"] == own && one["peer_forward"] == record["forward"] => {}
            _ => self.fault(case, format!("the agent's trail: {of_agent:?}")),
        }
        if self.counted.count() != count {
            self.fault(case, "somebody was dialled");
        }
    }

    fn done(self) {
        assert_eq!(self.faults, Vec::<String>::new());
    }
}

/// An address of this host for each login, so that none has to wait for what another has tried.
fn source(number: usize) -> String {
    format!("127.0.1.{}", number + 1)
}

/// What whoever connects is told before the end, which may come before the connection is known to be there.
async fn told(address: SocketAddr) -> Vec<u8> {
    let mut got = Vec::new();
    if let Ok(mut stream) = TcpStream::connect(address).await {
        // By a reset or in good order.
        drop(within("the end of a connection", stream.read_to_end(&mut got)).await);
    }
    got
}

// ---------------------------------------------------------------------------------------------------------------------
// The doors.

#[tokio::test]
async fn at_the_ssh_door_one_wrong_field_is_enough() {
    let mut world = World::linked().await;
    let (mut peer, mut other) = (Peer::start(), Peer::start());
    world.yard.enter(&mut peer, world.door, "acme/prod-eu", "provisioner").await;
    let mut narrow = None;
    for (number, case) in cases(Door::Ssh).into_iter().enumerate() {
        let Case(_, what, change, by) = &case;
        let mut ask = Ask::permitted(world.ports);
        if *what == "an address for the name" {
            ask = Ask { host: "127.0.0.1".to_owned(), ..Ask::by_name(world.ports) };
        }
        change(&mut ask);
        let mark = world.mark();
        if let By::Login(reason) = by {
            let source = ask.source.map_or_else(|| source(number), str::to_owned);
            let connect = json!({"do": "connect", "port": world.door.port(), "source": source});
            let from = other.ask(connect).await["local"].clone();
            other.ask(json!({"do": "client"})).await;
            let answer = other.try_ask(ask.login(&world.yard, &ask.name())).await;
            // Whoever asks for another service than ours has not even logged in.
            let told = answer["answers"] == json!([LOGIN_FAILURE]) && answer["open"] == true;
            if answer["ok"] != false || (!told && !reason.is_empty()) {
                world.fault(&case, &answer);
            }
            let open = other.try_ask(json!({"do": "open", "type": "direct-tcpip", "host": ask.host, "port": ask.port,
                "within": 0.2}));
            if open.await["message"] == 91 {
                world.fault(&case, "opened without a login");
            }
            other.ask(json!({"do": "drop"})).await;
            let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from;
            let record = world.yard.entry("gateway", mark.0, what, refused).await;
            if !reason.is_empty() && record["reason"] != *reason {
                world.fault(&case, &record);
            }
            if world.counted.count() != mark.2 {
                world.fault(&case, "somebody was dialled");
            }
        } else {
            if ask.key == "narrow" && narrow.is_none() {
                let mut session = Peer::start();
                world.yard.enter(&mut session, world.door, "acme/prod-eu", "narrow").await;
                narrow = Some(session);
            }
            let mark = world.mark();
            let session = narrow.as_mut().filter(|_| ask.key == "narrow").unwrap_or(&mut peer);
            let answer = session.ask(ask.open()).await;
            let plainly = answer["text"] == "not allowed" && answer["code"] == 1;
            if answer["message"] != 92 || (*by != By::Wire && !plainly) {
                world.fault(&case, &answer);
            }
            world.expect_denied(&case, &ask, mark).await;
        }
        // The same request without the change.
        let permitted = Ask::permitted(world.ports);
        if matches!(by, By::Login(_)) {
            world.yard.enter(&mut other, world.door, "acme/prod-eu", "provisioner").await;
            let opened = other.ask(permitted.open()).await;
            other.echoes(&opened).await;
        } else {
            let opened = peer.ask(permitted.open()).await;
            peer.echoes(&opened).await;
            peer.ask(json!({"do": "close", "id": opened["id"]})).await;
        }
    }
    let by_name = peer.ask(Ask::by_name(world.ports).open()).await;
    peer.echoes(&by_name).await;
    // The other way in at the same port: a principal's key is no agent's.
    let connected = other.ask(json!({"do": "connect", "port": world.door.port()})).await;
    let server = json!({"do": "server", "identification": "SSH-2.0-caponier_1 agent=acme/prod-eu/x",
        "key": world.yard.key("provisioner")});
    let login = other.ask(server).await;
    assert_eq!((&login["logins"], &login["open"]), (&json!([]), &json!(false)), "{login}");
    let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == connected["local"];
    let record = world.yard.entry("gateway", 0, "a principal that calls itself an agent", refused).await;
    assert_eq!(record["reason"], "other_holder", "{record}");
    world.done();
}

#[tokio::test]
async fn to_the_stock_client_one_wrong_field_looks_like_any_other() {
    let mut world = World::linked().await;
    let known = format!("[127.0.0.1]:{} {}\n", world.door.port(), world.yard.public("gateway"));
    world.yard.write("known_hosts", &known);
    let ssh = |world: &World, ask: &Ask| {
        let mut command = Command::new("ssh");
        command.env_remove("SSH_AUTH_SOCK").args(["-F", "none", "-o", "BatchMode=yes"]);
        command.args(["-o", "StrictHostKeyChecking=yes", "-o", "GlobalKnownHostsFile=none", "-o"]);
        command.arg(format!("UserKnownHostsFile={}", world.yard.path("known_hosts").display()));
        command.args(["-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-i"]).arg(world.yard.key(ask.key));
        command.args(["-p", &world.door.port().to_string(), "-W", &ask.target(), "-l", &ask.name()]);
        command
    };
    let cases: Vec<Case> = logins().into_iter().chain(targets()).collect();
    for (number, case) in cases.iter().enumerate() {
        let mut ask = Ask::permitted(world.ports);
        case.2(&mut ask);
        let mark = world.mark();
        let said = run(ssh(&world, &ask).args(["-b", &source(number), "127.0.0.1"])).await;
        let error = said.stderr.replace('\r', "");
        let expected = match case.3 {
            By::Login(_) => format!("{}@127.0.0.1: Permission denied (publickey).\n", ask.name()),
            _ => "channel 0: open failed: administratively prohibited: not allowed\nstdio forwarding failed\n".into(),
        };
        if (said.status.code(), said.stdout.as_str(), error.as_str()) != (Some(255), "", &*expected) {
            world.fault(case, format!("{said:?}"));
        }
        if let By::Login(reason) = case.3 {
            let record = world.yard.entry("gateway", mark.0, case.1, |it| it["event"] == "auth.refused").await;
            if record["reason"] != reason || world.counted.count() != mark.2 {
                world.fault(case, &record);
            }
        }
        world.expect_denied(case, &ask, mark).await;
    }
    // Its standard input has ended, and so the forward ends well.
    let said = run(ssh(&world, &Ask::permitted(world.ports)).arg("127.0.0.1")).await;
    assert_eq!(said.code(), 0, "{said:?}");
    world.done();
}

#[tokio::test]
async fn at_a_loopback_door_one_wrong_field_is_enough() {
    // Ports are known only when the world is there, and the doors have to stand in its configuration.
    let mut world = World::new().await;
    let cases = cases(Door::Local);
    let asks: Vec<Ask> = cases
        .iter()
        .map(|Case(_, _, change, _)| {
            let mut ask = Ask::permitted(world.ports);
            change(&mut ask);
            ask
        })
        .chain([Ask::permitted(world.ports), Ask::by_name(world.ports)])
        .collect();
    world.start_gateway(&asks).await;
    for (case, (ask, door)) in cases.iter().zip(asks.iter().zip(world.doors.clone())) {
        let mark = world.mark();
        let got = told(door).await;
        if !got.is_empty() {
            world.fault(case, format!("told {got:?}"));
        }
        world.expect_denied(case, ask, mark).await;
        let permitted = world.doors[cases.len()];
        echoes(connect(permitted).await, b"permitted").await;
    }
    echoes(connect(world.doors[cases.len() + 1]).await, b"by name").await;
    world.done();
}

#[tokio::test]
async fn at_the_connect_door_one_wrong_field_is_enough() {
    let mut world = World::linked().await;
    for case in cases(Door::Connect) {
        let Case(_, what, change, by) = &case;
        let mut ask = Ask::with_token(world.ports);
        if *what == "an address for the name" {
            ask = Ask { host: "127.0.0.1".to_owned(), port: world.ports.named, ..ask };
        }
        change(&mut ask);
        let mark = world.mark();
        let answer = connect_door::send(world.door, ask.request(&world.yard).as_bytes()).await;
        match by {
            By::Login(reason) => {
                if ![403, 407].contains(&answer.status) {
                    world.fault(&case, &answer.head);
                }
                // Only who has shown a good signature is told more than that it does not count.
                let word = answer.refusal().await["error"].as_str().unwrap_or_default().to_owned();
                let told = ["token_expired", "token_not_yet_valid"].contains(reason);
                let fixed = ["token_required", "token_refused", "not_allowed"].contains(&word.as_str());
                if if told { word != *reason } else { !fixed } {
                    world.fault(&case, word);
                }
                let record = world.yard.entry("gateway", mark.0, what, |it| it["event"] == "auth.refused").await;
                if record["reason"] != *reason || record["door"] != "connect" || world.counted.count() != mark.2 {
                    world.fault(&case, &record);
                }
            }
            By::Wire => {
                if ![400, 404].contains(&answer.status) {
                    world.fault(&case, &answer.head);
                }
            }
            By::Gateway(_) | By::Agent(_) => {
                if answer.status != 403 || answer.refusal().await["error"] != "not_allowed" {
                    world.fault(&case, "not told that it is not allowed");
                }
                world.expect_denied(&case, &ask, mark).await;
            }
        }
        let permitted = Ask::with_token(world.ports).request(&world.yard);
        let answer = connect_door::send(world.door, permitted.as_bytes()).await;
        assert_eq!(answer.status, 200, "after {what}: {}", answer.head);
        echoes(answer.stream, b"permitted").await;
    }
    for permitted in [
        Ask { host: "localhost".to_owned(), port: world.ports.named, ..Ask::with_token(world.ports) },
        Ask { key: "provisioner", ..Ask::with_token(world.ports) },
    ] {
        let answer = connect_door::send(world.door, permitted.request(&world.yard).as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", answer.head);
        echoes(answer.stream, b"permitted").await;
    }
    world.done();
}

#[tokio::test]
async fn for_our_own_client_one_wrong_field_is_enough() {
    let mut world = World::linked().await;
    let forward = |world: &World, ask: &Ask, targets: &[String]| {
        let mut command = caponier();
        command.args(["forward", "--gateway", &format!("ssh://127.0.0.1:{}", world.door.port())]);
        command.args(["--agent", &ask.name(), "--host-key", &world.yard.fingerprint(ask.pin), "--identity"]);
        command.arg(world.yard.key(ask.key));
        for target in targets {
            command.args(["-L", &format!("0:{target}")]);
        }
        command
    };
    let cases = cases(Door::Client);
    let (logins, opens): (Vec<&Case>, Vec<&Case>) =
        cases.iter().partition(|Case(_, _, _, by)| matches!(by, By::Login(_) | By::Wire));
    for case in logins {
        let mut ask = Ask::permitted(world.ports);
        case.2(&mut ask);
        let mark = world.mark();
        let said = run(&mut forward(&world, &ask, &[ask.target()])).await;
        if said.code() == 0 || !said.stdout.is_empty() {
            world.fault(case, format!("{said:?}"));
        }
        let By::Login(reason) = case.3 else {
            if !said.stderr.contains("host key") {
                world.fault(case, format!("{said:?}"));
            }
            continue;
        };
        if said.stderr.contains(reason) {
            world.fault(case, format!("told the reason: {said:?}"));
        }
        let record = world.yard.entry("gateway", mark.0, case.1, |it| it["event"] == "auth.refused").await;
        if record["reason"] != reason || world.counted.count() != mark.2 {
            world.fault(case, &record);
        }
    }
    let permitted = Ask::permitted(world.ports);
    let asks: Vec<Ask> = opens
        .iter()
        .map(|Case(_, _, change, _)| {
            let mut ask = permitted.clone();
            change(&mut ask);
            ask
        })
        .chain([permitted.clone(), Ask::by_name(world.ports)])
        .collect();
    let targets: Vec<String> = asks.iter().map(Ask::target).collect();
    let command = forward(&world, &permitted, &targets);
    world.yard.run("forward", command);
    let mut listeners = Vec::new();
    for target in &targets {
        let words = format!(" for {target}");
        let program = world.yard.program("forward");
        let line = eventually("a listener", async || {
            program.log().lines().find(|line| line.ends_with(&words)).map(str::to_owned)
        });
        let line = line.await;
        let (_, rest) = line.split_once("listening ").expect("an address");
        listeners.push(rest.split(' ').next().expect("an address").parse::<SocketAddr>().expect("an address"));
    }
    for (case, (ask, listener)) in opens.iter().zip(asks.iter().zip(&listeners)) {
        let mark = world.mark();
        let got = told(*listener).await;
        if !got.is_empty() {
            world.fault(case, format!("told {got:?}"));
        }
        world.expect_denied(case, ask, mark).await;
        let told = format!("connecting to {} is not allowed", ask.target());
        world.yard.program("forward").says(&told).await;
        echoes(connect(listeners[opens.len()]).await, b"permitted").await;
    }
    echoes(connect(listeners[opens.len() + 1]).await, b"by name").await;
    world.done();
}

#[tokio::test]
async fn at_an_agent_one_wrong_field_is_enough_whatever_its_gateway_says() {
    let mut world = World::new().await;
    let mut peer = Peer::start();
    let mut other = Peer::start();
    let cases = cases(Door::Agent);
    let (logins, opens): (Vec<&Case>, Vec<&Case>) =
        cases.iter().partition(|Case(_, _, _, by)| matches!(by, By::Login(_)));
    // A gateway for each login, so that none has to wait until the agent comes back.
    let mut ports = Vec::new();
    for _ in &logins {
        ports.push(other.ask(json!({"do": "listen"})).await["port"].clone());
    }
    let own = peer.ask(json!({"do": "listen"})).await["port"].clone();
    let gateways: Vec<String> = ports.iter().chain([&own]).map(|port| format!("\"ssh://127.0.0.1:{port}\"")).collect();
    world.start_agent(&gateways.join(", "), "\"ssh://127.0.0.1:9\"").await;
    for (case, (port, gateway)) in logins.iter().zip(ports.iter().zip(&gateways)) {
        let mut ask = Ask::from_gateway(world.ports);
        case.2(&mut ask);
        other.ask(json!({"do": "accept", "port": port})).await;
        other.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        let answer = other.ask(ask.login(&world.yard, ask.organisation)).await;
        if answer["ok"] != false || answer["answers"] != json!([LOGIN_FAILURE]) {
            world.fault(case, &answer);
        }
        other.ask(json!({"do": "drop"})).await;
        let refused = |it: &Value| it["event"] == "auth.refused" && it["detail"] == gateway.trim_matches('"');
        let record = world.yard.entry("agent", 0, case.1, refused).await;
        let By::Login(reason) = case.3 else { continue };
        let whose = record["organisation"] == "acme" && record["key"] == world.yard.fingerprint(ask.key);
        if record["reason"] != reason || !whose {
            world.fault(case, &record);
        }
    }
    peer.ask(json!({"do": "accept", "port": own})).await;
    world.yard.log_in_to_agent(&mut peer, "acme", "login-acme").await;
    let live = Ask { forward: Some(ForwardId::random().to_string()), ..Ask::from_gateway(world.ports) };
    let first = peer.gateway_forward(&live.originator(), &live.host, live.port).await;
    peer.echoes(&first).await;
    for case in opens {
        let mut ask = Ask::from_gateway(world.ports);
        case.2(&mut ask);
        if ask.forward.as_deref() == Some("LIVE") {
            ask.forward.clone_from(&live.forward);
        }
        // One control channel is the gateway's due; what it may do is another test's.
        if case.0 == Field::Control {
            let granted = peer.ask(ask.open()).await;
            assert_eq!(granted["message"], 91, "{granted}");
        }
        let (_, before, count) = world.mark();
        let mut open = ask.open();
        open["originator"] = ask.originator().into();
        let answer = peer.ask(open).await;
        let By::Agent(reason) = case.3 else {
            if answer["message"] != 92 {
                world.fault(case, &answer);
            }
            continue;
        };
        let malformed = reason.starts_with("malformed") || reason == "duplicate_forward";
        let code = if malformed { RefusalCode::Malformed } else { RefusalCode::Denied };
        if answer["message"] != 92 || answer["code"] != code as u32 {
            world.fault(case, &answer);
        }
        let record = world.yard.entry("agent", before, case.1, |it| it["event"] == "forward.denied").await;
        let whose = record["organisation"] == "acme" && record["key"] == world.yard.fingerprint("login-acme");
        if record["reason"] != reason || !whose {
            world.fault(case, &record);
        }
        if world.counted.count() != count {
            world.fault(case, "somebody was dialled");
        }
        let permitted = Ask::from_gateway(world.ports);
        let opened = peer.gateway_forward(&permitted.originator(), &permitted.host, permitted.port).await;
        peer.echoes(&opened).await;
        peer.ask(json!({"do": "close", "id": opened["id"]})).await;
    }
    let by_name = Ask { key: "login-acme", ..Ask::by_name(world.ports) };
    let opened = peer.gateway_forward(&by_name.originator(), &by_name.host, by_name.port).await;
    peer.echoes(&opened).await;
    peer.echoes(&first).await;
    world.done();
}

#[tokio::test]
async fn at_an_agents_own_listener_one_wrong_field_is_enough() {
    let mut world = World { listens: true, ..World::new().await };
    world.start_agent("\"ssh://127.0.0.1:9\"", "\"ssh://127.0.0.1:9\"").await;
    let line = world.yard.program("agent").says(LISTENING).await;
    let (_, address) = line.split_once(LISTENING).expect("an address");
    let door: SocketAddr = address.split(' ').next().expect("an address").parse().expect("an address");
    let permitted = Ask { host: "127.0.0.1".to_owned(), ..Ask::directly(world.ports) };
    let (mut peer, mut other, mut asserting) = (Peer::start(), Peer::start(), Peer::start());
    world.yard.enter(&mut peer, door, "acme", "direct").await;
    world.yard.enter(&mut asserting, door, "acme", "login-acme").await;
    for (number, case) in cases(Door::Listen).into_iter().enumerate() {
        let Case(_, what, change, by) = &case;
        let mut ask = permitted.clone();
        change(&mut ask);
        let (_, before, count) = world.mark();
        let reason = match by {
            By::Login(reason) => {
                let source = ask.source.map_or_else(|| source(number), str::to_owned);
                let connect = json!({"do": "connect", "port": door.port(), "source": source});
                let from = other.ask(connect).await["local"].clone();
                let line = ask.line.unwrap_or("SSH-2.0-paramiko_2.12.0");
                let exchanged = other.ask(json!({"do": "client", "identification": line})).await["exchanged"] == true;
                // Who comes from elsewhere or is no client is turned away before that.
                let early = [Field::Source, Field::Door].contains(&case.0);
                if exchanged == early {
                    world.fault(&case, format!("a key exchange: {exchanged}"));
                }
                if exchanged {
                    let answer = other.ask(ask.login(&world.yard, ask.organisation)).await;
                    if answer["ok"] != false || answer["answers"] != json!([LOGIN_FAILURE]) {
                        world.fault(&case, &answer);
                    }
                }
                other.ask(json!({"do": "drop"})).await;
                let refused = |it: &Value| it["event"] == "auth.refused" && it["client"] == from;
                let record = world.yard.entry("agent", before, what, refused).await;
                if record["reason"] != *reason || record["door"] != "listen" {
                    world.fault(&case, &record);
                }
                None
            }
            By::Gateway(_) => unreachable!("there is none"),
            By::Agent(reason) => Some(*reason),
            By::Wire => None,
        };
        if !matches!(by, By::Login(_)) {
            let session = if ask.key == "login-acme" { &mut asserting } else { &mut peer };
            let mut open = ask.open();
            open["originator"] = ask.originator().into();
            let answer = session.ask(open).await;
            let plainly = answer["text"] == "not allowed" && answer["code"] == 1;
            if answer["message"] != 92 || (reason.is_some() && !plainly) {
                world.fault(&case, &answer);
            }
        }
        if let Some(reason) = reason {
            let record = world.yard.entry("agent", before, what, |it| it["event"] == "forward.denied").await;
            let whose = record["organisation"] == "acme" && record["key"] == world.yard.fingerprint(ask.key);
            if record["reason"] != reason || record["door"] != "listen" || !whose {
                world.fault(&case, &record);
            }
        }
        if world.counted.count() != count {
            world.fault(&case, "somebody was dialled");
        }
        let mut open = permitted.open();
        open["originator"] = permitted.originator().into();
        let opened = peer.ask(open).await;
        peer.echoes(&opened).await;
        peer.ask(json!({"do": "close", "id": opened["id"]})).await;
    }
    // And nothing but forwards can be asked for.
    let folder = world.yard.path("");
    world.faults.extend(kinds::not_refused(&mut peer, world.ports.echo, &folder, || "127.0.0.1".to_owned()).await);
    assert!(!folder.join("executed").exists(), "a command was executed");
    world.done();
}

// ---------------------------------------------------------------------------------------------------------------------
// Nothing is missing.

/// Every file with a door, and every name that a trail has for one, belongs to a [`Door`]; and each has a case for every field.
#[test]
fn every_door_has_a_case_for_every_field() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // By `doctor` nobody comes in: it is what an agent's owner has examined, under the same rules; `doctor.rs` tries it.
    let known = |name: &str| ["ssh", "local", "listen", "connect", "doctor"].contains(&name);
    let mut faults = Vec::new();
    for file in fs::read_dir(source.join("gateway/door")).expect("the doors").flatten() {
        let name = file.path().file_stem().expect("a name").to_string_lossy().into_owned();
        if !known(&name) {
            faults.push(format!("src/gateway/door/{name}.rs is a door without refusals here"));
        }
    }
    for (path, text) in sources(&source) {
        let named = ["door(\"", "door: \"", "door: Some(\"", "DOOR: &str = \""];
        for part in named.iter().flat_map(|words| text.split(words).skip(1)) {
            let name = part.split('"').next().unwrap_or_default();
            if !known(name) {
                faults.push(format!("{path} records a door {name:?} that has no refusals here"));
            }
        }
    }
    for (door, fields) in APPLIES {
        let cases = cases(*door);
        for field in *fields {
            if !cases.iter().any(|case| case.0 == *field) {
                faults.push(format!("{door:?} has no case for {field:?}"));
            }
        }
        for Case(field, what, ..) in &cases {
            if !fields.contains(field) {
                faults.push(format!("{door:?} does not say that it has the field {field:?} of {what:?}"));
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

/// Every reason for which a login or a forward is refused stands in some end-to-end test, as what is expected there.
#[test]
fn every_reason_is_expected_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tests: Vec<(String, String)> = sources(&root.join("tests/e2e"));
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut reasons = BTreeSet::new();
    // Those that are values of a type.
    for (file, head) in [
        ("src/registry.rs", "fn as_str(self) -> &'static str {"),
        ("src/policy.rs", "fn as_str(self) -> &'static str {"),
        ("src/tls/judge.rs", "fn as_str(self) -> &'static str {"),
        ("src/identity/certificate.rs", "fn as_str(self) -> &'static str {"),
        ("src/identity/certificate.rs", "fn reason(&self) -> &'static str {"),
        ("src/registry/token_keys.rs", "fn as_str(self) -> &'static str {"),
        ("src/token.rs", "fn reason(&self) -> &'static str {"),
    ] {
        let text = read(file);
        let body = text.split_once(head).expect("its reasons").1.split_once("\n    }").expect("its end").0;
        let found: Vec<_> = words(body, &["=> \""]).collect();
        assert!(found.len() > 3, "{file}: {found:?}");
        reasons.extend(found);
    }
    // Those that are written where something is refused.
    for folder in ["src/gateway", "src/agent", "src/tunnel"] {
        let said = [
            "stranger(",
            "Refused::new(",
            "refused(\"",
            ".deny(",
            ".fail(",
            ".refuse(",
            ".unfit(",
            "turn_away(",
            "denied(",
            "Err((\"",
            "Err(\"",
        ];
        let before = reasons.len();
        for (_, text) in sources(&root.join(folder)).into_iter().filter(|(path, _)| !path.ends_with("/tests.rs")) {
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            for line in text.lines().filter(|line| said.iter().any(|words| line.contains(words))) {
                // A type of channel that is refused is none.
                reasons.extend(words(line, &["\""]).filter(|word| is_reason(word) && word != "unknown"));
            }
        }
        assert!(reasons.len() > before, "{folder} refuses nothing");
    }
    for (reason, file, expected) in SHOWN_ELSEWHERE {
        assert!(reasons.contains(*reason), "{reason} is no reason any more");
        assert!(read(file).contains(expected), "{file} does not expect {reason}");
    }
    let expects = |reason: &str| tests.iter().any(|(_, text)| text.contains(&format!("\"{reason}\"")));
    let elsewhere = |reason: &str| SHOWN_ELSEWHERE.iter().any(|(known, ..)| *known == reason);
    let unexpected: Vec<&String> = reasons.iter().filter(|reason| !expects(reason) && !elsewhere(reason)).collect();
    assert_eq!(unexpected, Vec::<&String>::new(), "no end-to-end test expects these");
}

/// Reasons that no end-to-end test reads in a trail, with what shows them instead.
const SHOWN_ELSEWHERE: &[(&str, &str, &str)] = &[
    // The resolver fails before the policy is asked about nothing.
    ("no_address", "tests/e2e/dns.rs", "\"it exists, but has no address\""),
    ("no_address", "src/policy/rule/tests.rs", "NoAddress"),
    // The SSH library, or the stock client, refuses such a certificate before it is judged.
    ("certificate_expired", "src/agent/live/tests.rs", "\"certificate_expired\""),
    ("certificate_not_yet_valid", "src/agent/live/tests.rs", "\"certificate_not_yet_valid\""),
    ("certificate_type", "src/agent/live/tests.rs", "\"certificate_type\""),
    ("certificate_malformed", "src/identity/certificate/tests.rs", "\"certificate_malformed\""),
    ("certificate_signature", "src/identity/certificate/tests.rs", "\"certificate_signature\""),
    ("certificate_weak_key", "src/identity/certificate/tests.rs", "\"certificate_weak_key\""),
    ("certificate_nested", "src/identity/certificate/tests.rs", "CertificateError::Nested"),
    // Nobody who signs in good faith signs that.
    ("token_claims", "src/token/tests.rs", "Some(\"token_claims\")"),
    // Limits, which are shown where they are kept.
    ("too_many_handshakes", "src/tunnel/admit.rs", "HANDSHAKES_PER_ADDRESS"),
    ("sessions_per_organisation", "src/agent/usage.rs", "\"sessions_per_organisation\""),
    ("control_channel", "tests/e2e/raw.rs", "garbage_on_the_control_channel_costs_the_link_at_most"),
];

/// What stands between one of these beginnings and the next quotation mark.
fn words<'a>(text: &'a str, beginnings: &'a [&str]) -> impl Iterator<Item = String> + 'a {
    let parts = beginnings.iter().flat_map(|beginning| text.split(beginning).skip(1));
    parts.filter_map(|part| part.split('"').next()).map(str::to_owned)
}

/// Whether it looks as the trail's reasons do.
fn is_reason(word: &str) -> bool {
    word.len() > 3
        && word.contains(|c: char| c.is_ascii_lowercase())
        && !word.starts_with('_')
        && !word.ends_with('_')
        && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push((path.display().to_string(), fs::read_to_string(&path).expect("a source")));
        }
    }
    found
}
