//! The CONNECT door: signed URLs and the clients that take them, tokens that do not count, and the end of what rests on one.
//!
//! Where the client does not matter, requests are written byte by byte and in clear, which loopback may.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use caponier::identity::{Algorithm, PrivateKey};
use caponier::task::Tasks;
use caponier::token::Claims;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    AGENT, Plan, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, run, within,
};

/// Where the registry has acme's keys that sign tokens.
pub(crate) const TOKEN_KEYS: &str = "acme/token-keys";

/// What answered a request, and the connection, of which nothing more has been read.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) stream: TcpStream,
}

impl Answer {
    /// What a refusal says.
    pub(crate) async fn refusal(mut self) -> Value {
        let mut body = Vec::new();
        // To the end, which must be an orderly one.
        within("the end of a refusal", self.stream.read_to_end(&mut body)).await.expect("an orderly end");
        assert!(self.head.contains("Connection: close"), "{}", self.head);
        assert!(self.head.contains(&format!("Content-Length: {}\r\n", body.len())), "{}", self.head);
        assert_eq!(self.head.contains("Proxy-Authenticate: "), self.status == 407, "{}", self.head);
        serde_json::from_slice(&body).expect("JSON")
    }
}

/// Sends these bytes, and reads the head of what answers.
pub(crate) async fn send(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut stream = within("a connection", TcpStream::connect(address)).await.expect("a connection");
    stream.write_all(bytes).await.expect("written");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = within("an answer", stream.read_u8()).await;
        head.push(byte.unwrap_or_else(|error| panic!("{error} after {:?}", String::from_utf8_lossy(&head))));
    }
    let head = String::from_utf8(head).expect("text");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer { status: status.unwrap_or_else(|| panic!("no status: {head}")), head, stream }
}

/// A request with a token as a bearer.
pub(crate) fn bearing(token: &str, target: impl std::fmt::Display) -> String {
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Bearer {token}\r\n\r\n")
}

async fn ask(site: &Site, token: &str, target: SocketAddr) -> Answer {
    send(site.address, bearing(token, target).as_bytes()).await
}

async fn opened(site: &Site, token: &str, target: SocketAddr) -> TcpStream {
    opened_at(site.address, token, target).await
}

async fn opened_at(door: SocketAddr, token: &str, target: SocketAddr) -> TcpStream {
    let answer = send(door, bearing(token, target).as_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.head);
    answer.stream
}

async fn refused(site: &Site, token: &str, target: SocketAddr) -> (u16, String) {
    let answer = ask(site, token, target).await;
    let status = answer.status;
    (status, answer.refusal().await["error"].as_str().expect("a word").to_owned())
}

/// Claims for the site's principal and agent, from now on and for an hour.
pub(crate) fn claims() -> Claims {
    claims_for("provisioner", AGENT)
}

fn claims_for(principal: &str, agent: &str) -> Claims {
    let (principal, agent) = (principal.parse().expect("an id"), agent.parse().expect("a name"));
    Claims::new(principal, agent, None, Timestamp::now(), SignedDuration::from_hours(1)).expect("claims")
}

pub(crate) fn signed(claims: &Claims, key: &Path) -> String {
    let key = PrivateKey::read(key).expect("a key");
    claims.sign(&key).expect("a token").text().expose().clone()
}

/// Registers a key that signs tokens, for these principals.
pub(crate) fn register(plan: &Plan, folder: &str, name: &str, principals: &str) -> PathBuf {
    let key = plan.key(name);
    plan.registry().key(folder, name, &plan.public(name));
    plan.registry().about_key(folder, name, &format!("principals = [\"{principals}\"]\n"));
    key
}

/// A site whose agent leads to an echo, with a key `signer` that may sign for the provisioner.
pub(crate) async fn site() -> (Site, SocketAddr, PathBuf) {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    (plan.start().await, target, key)
}

#[tokio::test]
async fn what_does_not_count_is_refused_in_one_of_the_fixed_texts() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    // One that is there, and that nobody is granted.
    plan.key("stage");
    plan.registry().key("acme/agents/stage", "one", &plan.public("stage"));
    let site = plan.start().await;
    let other = site.key("other-signer");
    let good = signed(&claims(), &key);
    let at = Timestamp::now();
    let moved = |hours: i64| {
        let by = SignedDuration::from_hours(hours);
        let claims = claims();
        Claims { issued: claims.issued + by, begins: claims.begins + by, expires: claims.expires + by, ..claims }
    };
    let mut altered = good.clone();
    altered.replace_range(
        good.len() - 8..good.len() - 7,
        if &good[good.len() - 8..good.len() - 7] == "A" { "B" } else { "A" },
    );
    let own = {
        let key = PrivateKey::read(&site.key("provisioner")).expect("a key");
        claims().sign_with_ssh(&key).expect("a token").text().expose().clone()
    };
    let by_agent = {
        let key = PrivateKey::read(&site.key("agent")).expect("a key");
        claims().sign_with_ssh(&key).expect("a token").text().expose().clone()
    };
    let unsigned = format!("{}.", good.rsplit_once('.').expect("parts").0);
    let mut answers = std::collections::HashMap::new();
    for (case, token, status, word, reason) in [
        ("garbage", "garbage".to_owned(), 407, "token_refused", "token_malformed"),
        ("empty", String::new(), 407, "token_refused", "token_malformed"),
        ("huge", "A".repeat(5000), 407, "token_refused", "token_malformed"),
        ("altered", altered, 407, "token_refused", "token_signature"),
        ("unsigned", unsigned, 407, "token_refused", "token_signature"),
        ("another key", signed(&claims(), &other), 407, "token_refused", "unknown_key"),
        ("an agent's key", by_agent, 407, "token_refused", "unknown_key"),
        (
            "a principal's key as if it signed for others",
            signed(&claims(), &site.key("provisioner")),
            407,
            "token_refused",
            "other_holder",
        ),
        (
            "another organisation",
            signed(&claims_for("provisioner", "globex/prod-eu"), &key),
            407,
            "token_refused",
            "other_organisation",
        ),
        (
            "no organisation",
            signed(&claims_for("provisioner", "initech/prod-eu"), &key),
            407,
            "token_refused",
            "unknown_organisation",
        ),
        (
            "a principal that it may not sign for",
            signed(&claims_for("dba", AGENT), &key),
            407,
            "token_refused",
            "token_principal",
        ),
        ("expired", signed(&moved(-2), &key), 407, "token_expired", "token_expired"),
        ("early", signed(&moved(2), &key), 407, "token_not_yet_valid", "token_not_yet_valid"),
        (
            "no such agent",
            signed(&claims_for("provisioner", "acme/prod-xx"), &key),
            403,
            "not_allowed",
            "unknown_agent",
        ),
        (
            "an agent without a grant",
            signed(&claims_for("provisioner", "acme/stage"), &key),
            403,
            "not_allowed",
            "not_granted",
        ),
    ] {
        let before = site.trail(Side::Gateway).len();
        let answer = ask(&site, &token, target).await;
        assert_eq!(answer.status, status, "{case}: {}", answer.head);
        let head = answer.head.clone();
        let said = answer.refusal().await;
        assert_eq!(said["error"], word, "{case}: {said}");
        // What is told to nobody else differs in nothing.
        if ["token_refused", "not_allowed"].contains(&word) {
            let first = answers.entry(word).or_insert_with(|| (head.clone(), said.clone()));
            assert_eq!(*first, (head, said.clone()), "{case}");
        }
        let record = eventually(case, async || {
            site.trail(Side::Gateway).into_iter().skip(before).find(|it| it["event"] == "auth.refused")
        })
        .await;
        assert_eq!((&record["reason"], &record["door"]), (&json!(reason), &json!("connect")), "{case}: {record}");
        if reason.starts_with("token_expired") || reason.starts_with("token_not") {
            let sentence = said["message"].as_str().expect("a sentence");
            // The gateway's clock, to the hour at least.
            assert!(sentence.contains(&at.to_string()[..11]), "{sentence}");
            assert!(record["token"].is_string() && record["principal"] == "provisioner", "{record}");
        }
    }
    for (case, request) in [
        ("nothing", format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")),
        (
            "another user",
            format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Basic YWRtaW46eA==\r\n\r\n"),
        ),
        ("two", bearing(&good, target).replace("\r\n\r\n", &format!("\r\nProxy-Authorization: Bearer {good}\r\n\r\n"))),
        ("another scheme", bearing(&good, target).replace("Bearer", "Digest")),
        ("not the proxy's", bearing(&good, target).replace("Proxy-Auth", "Auth")),
    ] {
        let answer = send(site.address, request.as_bytes()).await;
        assert_eq!(answer.status, 407, "{case}: {}", answer.head);
        let word = answer.refusal().await["error"].clone();
        let missing = ["nothing", "not the proxy's"].contains(&case);
        assert_eq!(word, if missing { "token_required" } else { "token_refused" }, "{case}");
    }
    let named = bearing(&good, target).replace("\r\n\r\n", "\r\nCaponier-Agent: acme/other\r\n\r\n");
    let answer = send(site.address, named.as_bytes()).await;
    assert_eq!(answer.status, 403, "{}", answer.head);
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "token_agent"})).await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "forward.open"})), Vec::<Value>::new());
    for token in [&good, &own] {
        echoes(opened(&site, token, target).await, b"and what counts works").await;
    }
    site.stop().await;
}

#[tokio::test]
async fn a_token_narrows_what_its_principal_may_and_the_policies_do_the_rest() {
    let (allowed, other, closed) = (echo().await, echo().await, echo().await);
    let plan = Site::plan().allow(allowed).allow(other);
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    let site = plan.start().await;
    let narrow = Claims { targets: Some(vec![allowed.to_string().parse().expect("a target")]), ..claims() };
    let (narrow, wide) = (signed(&narrow, &key), signed(&claims(), &key));
    echoes(opened(&site, &narrow, allowed).await, b"as it says").await;
    echoes(opened(&site, &wide, other).await, b"as it does not say").await;
    let not_allowed = (403, "not_allowed".to_owned());
    assert_eq!(refused(&site, &narrow, other).await, not_allowed);
    site.record(Side::Gateway, json!({"event": "forward.denied", "door": "connect", "reason": "token_target"})).await;
    assert_eq!(refused(&site, &wide, closed).await, not_allowed);
    site.record(Side::Agent, json!({"event": "forward.denied", "reason": "port"})).await;
    for target in ["db", "db:0", "0177.0.0.1:80", "user@db:80", "https://db:80", "127.0.0.1 :80"] {
        let answer = send(site.address, bearing(&wide, target).as_bytes()).await;
        // Some of them are no request at all.
        assert!([400, 403].contains(&answer.status), "{target}: {}", answer.head);
    }
    site.stop().await;
}

#[tokio::test]
async fn a_live_forward_ends_with_whatever_its_token_rests_on() {
    let target = echo().await;
    let plan = Site::plan().allow(target);
    let keys = ["first", "second", "third"].map(|name| register(&plan, TOKEN_KEYS, name, "*"));
    plan.registry().about("acme/principals/other", "agents = [\"*\"]");
    let site = plan.start().await;
    let stays = opened(&site, &signed(&claims(), &keys[2]), target).await;
    let brief = {
        // With the leeway it has a few seconds left.
        let now = Timestamp::now();
        let ago = |seconds| now - SignedDuration::from_secs(seconds);
        Claims { issued: ago(600), begins: ago(600), expires: ago(55), ..claims() }
    };
    let withdrawn = claims();
    let cases = [
        ("expired", signed(&brief, &keys[2]), None, (407, "token_expired"), "expired"),
        (
            "the token was withdrawn",
            signed(&withdrawn, &keys[2]),
            Some((TOKEN_KEYS, "third", format!("principals = [\"*\"]\nrevoked_tokens = [\"{}\"]\n", withdrawn.id))),
            (407, "token_revoked"),
            "revoked",
        ),
        (
            "its key was withdrawn",
            signed(&claims(), &keys[0]),
            Some((TOKEN_KEYS, "first", "principals = [\"*\"]\nrevoked = true\n".to_owned())),
            (407, "token_refused"),
            "revoked",
        ),
        (
            "its key signs for others now",
            signed(&claims(), &keys[1]),
            Some((TOKEN_KEYS, "second", "principals = [\"other\"]\n".to_owned())),
            (407, "token_refused"),
            "revoked",
        ),
        (
            "its principal may not any more",
            signed(&claims_for("other", AGENT), &keys[2]),
            Some(("acme/principals", "other", "agents = [\"elsewhere\"]\n".to_owned())),
            (403, "not_allowed"),
            "revoked",
        ),
    ];
    for (case, token, change, (status, word), reason) in cases {
        let mut stream = opened(&site, &token, target).await;
        echoes(&mut stream, b"while it counts").await;
        let before = site.records(Side::Gateway, &json!({"event": "forward.ended"})).len();
        if let Some((folder, name, toml)) = change {
            site.registry().about_key(folder, name, &toml);
        }
        let mut rest = Vec::new();
        let end = within(case, stream.read_to_end(&mut rest)).await;
        assert!(end.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset), "{case}: {rest:?}");
        let ended = eventually(case, async || {
            site.records(Side::Gateway, &json!({"event": "forward.ended"})).into_iter().nth(before)
        })
        .await;
        assert_eq!(ended["reason"], reason, "{case}: {ended}");
        assert_eq!(refused(&site, &token, target).await, (status, word.to_owned()), "{case}: shown again");
    }
    echoes(stays, b"what rests on another goes on").await;
    site.stop().await;
}

#[tokio::test]
async fn what_follows_the_head_is_the_tunnels() {
    let (site, target, key) = site().await;
    let token = signed(&claims(), &key);
    let request = bearing(&token, target);
    // What looks like requests, of which the second would be refused, is nothing but bytes.
    let mut behind: Vec<u8> = (0..1000_u32).map(|number| (number % 251) as u8).collect();
    behind.extend(request.as_bytes());
    behind.extend(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut answer = send(site.address, &[request.as_bytes(), &behind].concat()).await;
    assert_eq!(answer.status, 200, "{}", answer.head);
    let mut back = vec![0; behind.len()];
    within("what was behind it", answer.stream.read_exact(&mut back)).await.expect("read");
    assert!(back == behind, "something else came back");
    echoes(&mut answer.stream, b"and on it goes").await;
    answer.stream.shutdown().await.expect("the end of one direction");
    let mut rest = Vec::new();
    within("the end", answer.stream.read_to_end(&mut rest)).await.expect("an orderly end");
    assert_eq!(rest, b"");
    let ended = site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "eof"})).await;
    assert_eq!(ended["to_target"], behind.len() + 14, "{ended}");
    assert_eq!(site.records(Side::Gateway, &json!({"event": "forward.open"})).len(), 1);
    // A refusal is read also by who has sent a lot behind it.
    let long = [bearing("garbage", target).as_bytes(), &vec![b'x'; 30_000]].concat();
    let answer = send(site.address, &long).await;
    assert_eq!(answer.status, 407);
    assert_eq!(answer.refusal().await["error"], "token_refused");
    site.stop().await;
}

#[tokio::test]
async fn organisations_do_not_sign_for_each_other() {
    let target = echo().await;
    let plan = Site::plan().allow(target).serve_globex();
    let ours = register(&plan, TOKEN_KEYS, "ours", "*");
    let theirs = register(&plan, "globex/token-keys", "theirs", "*");
    let shared = register(&plan, TOKEN_KEYS, "shared", "*");
    let site = plan.start().await;
    let for_acme = claims();
    let for_globex = claims_for("provisioner", "globex/prod-eu");
    eventually("both links", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() == 2).then_some(())
    })
    .await;
    echoes(opened(&site, &signed(&for_acme, &ours), target).await, b"acme").await;
    echoes(opened(&site, &signed(&for_globex, &theirs), target).await, b"globex").await;
    let no = (407, "token_refused".to_owned());
    for (claims, key) in [(&for_acme, &theirs), (&for_globex, &ours), (&for_globex, &shared)] {
        assert_eq!(refused(&site, &signed(claims, key), target).await, no);
    }
    for organisation in ["acme", "globex"] {
        let open = site.records(Side::Gateway, &json!({"event": "forward.open", "organisation": organisation}));
        assert_eq!(open.len(), 1, "{open:?}");
    }
    // A key that both have registered signs for each.
    site.registry().key("globex/token-keys", "shared", &site.public("shared"));
    site.registry().about_key("globex/token-keys", "shared", "principals = [\"prov*\"]\n");
    eventually("the registry is taken over", async || {
        (ask(&site, &signed(&for_globex, &shared), target).await.status == 200).then_some(())
    })
    .await;
    echoes(opened(&site, &signed(&for_acme, &shared), target).await, b"acme").await;
    site.stop().await;
}

#[tokio::test]
async fn keys_replace_each_other_under_load() {
    let (site, target, key) = site().await;
    let door = site.address;
    let key = Arc::new(Mutex::new(key));
    let stop = CancellationToken::new();
    let tasks = Tasks::new();
    let (done, mut said) = tokio::sync::mpsc::channel(16);
    let rounds: Arc<[AtomicUsize; 8]> = Arc::default();
    for one in 0..rounds.len() {
        let (key, stop, done, rounds) = (key.clone(), stop.clone(), done.clone(), rounds.clone());
        tasks.spawn(async move {
            while !stop.is_cancelled() {
                let key = key.lock().expect("a lock").clone();
                echoes(opened_at(door, &signed(&claims(), &key), target).await, b"under load").await;
                rounds[one].fetch_add(1, Ordering::SeqCst);
            }
            done.send(one).await.expect("heard");
        });
    }
    drop(done);
    let done_by_each = || rounds.each_ref().map(|rounds| rounds.load(Ordering::SeqCst));
    let mut old = "signer".to_owned();
    for round in 0..4 {
        let new = format!("signer-{round}");
        let file = site.key(&new);
        // The sidecar first: a key without one is a fault.
        let registry = site.registry();
        registry.about_key(TOKEN_KEYS, &format!(".{new}"), "");
        fs::write(registry.folder(TOKEN_KEYS).join(format!(".{new}.pub")), site.public(&new)).expect("written");
        registry.about_key(TOKEN_KEYS, &new, "principals = [\"prov*\"]\n");
        registry.key(TOKEN_KEYS, &new, &site.public(&new));
        eventually("the new key counts", async || {
            (ask(&site, &signed(&claims(), &file), target).await.status == 200).then_some(())
        })
        .await;
        *key.lock().expect("a lock") = file;
        // Whoever had read the name of the old one has done so for the round that is under way: each has to end one.
        let before = done_by_each();
        eventually("what was signed with the old key is through", async || {
            done_by_each().iter().zip(&before).all(|(now, before)| now > before).then_some(())
        })
        .await;
        registry.about_key(TOKEN_KEYS, &old, "principals = [\"prov*\"]\nrevoked = true\n");
        let gone = signed(&claims(), &site.key(&old));
        eventually("the old key counts no more", async || {
            (ask(&site, &gone, target).await.status == 407).then_some(())
        })
        .await;
        old = new;
    }
    stop.cancel();
    let mut all = Vec::new();
    while let Some(one) = within("everybody is done", said.recv()).await {
        all.push(one);
    }
    assert_eq!(all.len(), rounds.len(), "somebody was refused");
    site.stop().await;
}

#[tokio::test]
async fn many_come_at_once_and_who_finds_no_agent_is_told() {
    let (mut site, target, key) = site().await;
    let token = signed(&claims(), &key);
    let mut streams = Vec::new();
    // As many at once as may come from one address without having shown a token, or fewer.
    for _ in 0..5 {
        let before = streams.len();
        for _ in 0..20 {
            let mut stream = connect(site.address).await;
            stream.write_all(bearing(&token, target).as_bytes()).await.expect("written");
            streams.push(stream);
        }
        for stream in &mut streams[before..] {
            let mut head = vec![0; b"HTTP/1.1 200 Connection established\r\n\r\n".len()];
            within("an answer", stream.read_exact(&mut head)).await.expect("read");
            assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&head));
        }
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        echoes(stream, format!("number {number}").as_bytes()).await;
    }
    drop(streams);
    site.program(Side::Agent).kill().await;
    site.record(Side::Gateway, json!({"event": "link.down"})).await;
    let (status, word) = refused(&site, &token, target).await;
    assert_eq!((status, word.as_str()), (502, "not_available"));
    site.restart_agent().await;
    site.linked().await;
    echoes(opened(&site, &token, target).await, b"by a new link").await;
    site.stop().await;
}

/// An authority in a folder, and what it signs: `NAME.pem` and `NAME.key`.
struct Authority {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
        fs::write(dir.join(format!("{name}.pem")), issuer.pem()).expect("written");
        Self { dir: dir.to_owned(), issuer }
    }

    fn sign(&self, name: &str, names: Vec<SanType>, client: bool) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.subject_alt_names = names;
        params.extended_key_usages =
            vec![if client { ExtendedKeyUsagePurpose::ClientAuth } else { ExtendedKeyUsagePurpose::ServerAuth }];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let [chain, file] = ["pem", "key"].map(|ending| self.dir.join(format!("{name}.{ending}")));
        fs::write(&chain, certificate.pem()).expect("written");
        fs::write(&file, key.serialize_pem()).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("a mode");
        (chain, file)
    }

    /// For a server on this host.
    fn server(&self, name: &str) -> (PathBuf, PathBuf) {
        let names =
            vec![SanType::DnsName("localhost".try_into().expect("a name")), SanType::IpAddress([127, 0, 0, 1].into())];
        self.sign(name, names, false)
    }
}

/// A target that speaks TLS, and answers every request with `hello through the tunnel`.
async fn tls_web(chain: &Path, key: &Path) -> SocketAddr {
    let chain = CertificateDer::pem_file_iter(chain).expect("a file").collect::<Result<Vec<_>, _>>().expect("a chain");
    let key = PrivateKeyDer::from_pem_file(key).expect("a key");
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).expect("a configuration");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    listen(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => return,
                }
            }
            let reply = "HTTP/1.1 200 OK\r\nContent-Length: 24\r\nConnection: close\r\n\r\nhello through the tunnel";
            drop(stream.write_all(reply.as_bytes()).await);
            drop(stream.shutdown().await);
        }
    })
    .await
}

/// A plan whose gateway has a certificate by `gateway-ca.pem`, with a target that has one by `target-ca.pem`.
pub(crate) async fn tls_plan() -> (Plan, SocketAddr) {
    let plan = Site::plan();
    let (chain, key) = Authority::new(plan.path(), "target-ca").server("target");
    let target = tls_web(&chain, &key).await;
    Authority::new(plan.path(), "gateway-ca").server("gateway-tls");
    let plan =
        plan.allow(target).gateway_table("[[certificate]]\nchain = \"gateway-tls.pem\"\nkey = \"gateway-tls.key\"");
    (plan, target)
}

fn curl(site: &Site, target: SocketAddr) -> Command {
    let mut command = Command::new("curl");
    command.args(["-q", "-sS", "--max-time", "30", "--noproxy", "", "--cacert"]).arg(site.path().join("target-ca.pem"));
    command.arg("--proxy-cacert").arg(site.path().join("gateway-ca.pem")).arg(format!("https://{target}/"));
    command
}

#[tokio::test]
async fn a_signed_url_serves_clients_of_https_proxies() {
    let (plan, target) = tls_plan().await;
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    let site = plan.start().await;
    let port = site.address.port();
    let gateway = format!("localhost:{port}");
    let mut make = caponier();
    make.args(["url", AGENT, "--gateway", &gateway, "--principal", "provisioner", "--json", "--key"]).arg(&key);
    let made: Value =
        serde_json::from_str(&run(make.args(["--target", &target.to_string()])).await.done()).expect("JSON");
    let url = made["url"].as_str().expect("a URL");
    let hello = "hello through the tunnel";

    let said = run(curl(&site, target).env("HTTPS_PROXY", url)).await;
    assert_eq!(said.done(), hello);

    let node = r#"
        const https = require('https'), tls = require('tls'), fs = require('fs');
        const [proxy, [folder, target]] = [new URL(process.env.HTTPS_PROXY), process.argv.slice(1)];
        const basic = Buffer.from(`${proxy.username}:${proxy.password}`).toString('base64');
        const ask = https.request({ host: proxy.hostname, port: proxy.port, method: 'CONNECT', path: target,
            ca: fs.readFileSync(`${folder}/gateway-ca.pem`), headers: { 'Proxy-Authorization': `Basic ${basic}` } });
        ask.on('connect', (answer, socket) => {
            if (answer.statusCode !== 200) throw new Error(`${answer.statusCode}`);
            const ca = fs.readFileSync(`${folder}/target-ca.pem`);
            const inner = tls.connect({ socket, ca, host: target.split(':')[0] });
            inner.write('GET / HTTP/1.1\r\nHost: target\r\n\r\n');
            let all = '';
            inner.on('data', data => all += data).on('end', () => console.log(all.split('\r\n\r\n')[1]));
        });
        ask.end();
    "#;
    let mut command = Command::new("node");
    command.args(["-e", node]).arg(site.path()).arg(target.to_string()).env("HTTPS_PROXY", url);
    assert_eq!(run(&mut command).await.done().trim(), hello);

    // Python's own client speaks to proxies in clear alone, which is taken on loopback. The next test has clients for TLS.
    let python = "import ssl, sys, urllib.request as r\n\
                  context = ssl.create_default_context(cafile=sys.argv[1])\n\
                  opener = r.build_opener(r.ProxyHandler(), r.HTTPSHandler(context=context))\n\
                  print(opener.open(sys.argv[2], timeout=30).read().decode())";
    let clear = url.replacen("https://", "http://", 1);
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", python]).arg(site.path().join("target-ca.pem")).arg(format!("https://{target}/"));
    command.env("https_proxy", clear).env_remove("no_proxy").env_remove("NO_PROXY");
    assert_eq!(run(&mut command).await.done().trim(), hello);

    let fingerprint = PrivateKey::read(&key).expect("a key").public().fingerprint().to_string();
    let open = site.records(Side::Gateway, &json!({"event": "forward.open"}));
    assert_eq!(open.len(), 3, "{open:?}");
    for record in open {
        assert_eq!((&record["door"], &record["principal"]), (&json!("connect"), &json!("provisioner")), "{record}");
        assert_eq!((&record["key"], &record["token"]), (&json!(fingerprint), &made["jti"]), "{record}");
        assert_eq!(record["asserted_by"], fingerprint.as_str(), "{record}");
    }

    let late = {
        let hour = SignedDuration::from_hours(2);
        let claims = claims();
        Claims { issued: claims.issued - hour, begins: claims.begins - hour, expires: claims.expires - hour, ..claims }
    };
    let late = format!("https://caponier:{}@{gateway}", signed(&late, &key));
    let said = run(curl(&site, target).args(["-w", "%{http_connect}"]).env("HTTPS_PROXY", &late)).await;
    assert!(said.code() != 0 && said.stdout.contains("407"), "{said:?}");
    // An altered one, in the middle of what is signed.
    let altered = url.replacen(".ey", ".fy", 1);
    let said = run(curl(&site, target).args(["-w", "%{http_connect}"]).env("HTTPS_PROXY", &altered)).await;
    assert!(said.code() != 0 && said.stdout.contains("407"), "{said:?}");
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "token_signature"})).await;

    // Neither of them is anywhere but where it was put.
    let signatures = [url, &late].map(|url| {
        let token = url.split(['@', ':']).nth(2).expect("a token");
        token.rsplit('.').next().expect("a signature").to_owned()
    });
    for entry in fs::read_dir(site.path()).expect("a folder").flatten() {
        let Ok(text) = fs::read(entry.path()) else { continue };
        let text = String::from_utf8_lossy(&text);
        for signature in &signatures {
            assert!(!text.contains(signature.as_str()), "{} has a token", entry.path().display());
        }
    }
    site.stop().await;
}

#[tokio::test]
async fn python_takes_a_signed_url_over_tls() {
    let (plan, target) = tls_plan().await;
    let key = register(&plan, TOKEN_KEYS, "signer", "prov*");
    let site = plan.start().await;
    let url = |claims: &Claims| format!("https://caponier:{}@localhost:{}", signed(claims, &key), site.address.port());
    // One set of CAs for both legs is all that the environment can say, so that the file has both.
    let authorities = ["gateway-ca.pem", "target-ca.pem"].map(|name| fs::read_to_string(site.path().join(name)));
    let both = site.path().join("both-cas.pem");
    fs::write(&both, authorities.map(|text| text.expect("a CA")).concat()).expect("written");
    let requests = "import sys, requests\n\
                    try: print(requests.get(sys.argv[1], timeout=30).text)\n\
                    except requests.exceptions.RequestException as error: sys.exit(str(error))";
    let pools = "import os, ssl, sys, urllib3\n\
                 url, folder = urllib3.util.parse_url(os.environ['HTTPS_PROXY']), sys.argv[2]\n\
                 pool = urllib3.ProxyManager(url.url, ca_certs=folder + '/target-ca.pem', timeout=30, retries=False,\n\
                 proxy_ssl_context=ssl.create_default_context(cafile=folder + '/gateway-ca.pem'),\n\
                 proxy_headers=urllib3.make_headers(proxy_basic_auth=url.auth))\n\
                 print(pool.request('GET', sys.argv[1]).data.decode())";
    let ask = async |script: &str, authorities: &Path, url: &str| {
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", script, &format!("https://{target}/")]).arg(site.path());
        command.env("HTTPS_PROXY", url).env("REQUESTS_CA_BUNDLE", authorities);
        for name in ["NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "CURL_CA_BUNDLE"] {
            command.env_remove(name);
        }
        run(&mut command).await
    };
    let late = {
        let (hour, claims) = (SignedDuration::from_hours(2), claims());
        Claims { issued: claims.issued - hour, begins: claims.begins - hour, expires: claims.expires - hour, ..claims }
    };

    // A gateway whose certificate is by nobody that it knows never sees the token.
    let said = ask(requests, &site.path().join("target-ca.pem"), &url(&claims())).await;
    assert!(said.code() != 0 && said.stderr.contains("CERTIFICATE_VERIFY_FAILED"), "{said:?}");
    let said = ask(requests, &both, &url(&late)).await;
    assert!(said.code() != 0 && said.stderr.contains("407"), "{said:?}");
    site.record(Side::Gateway, json!({"event": "auth.refused", "reason": "token_expired"})).await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "forward.open"})).len(), 0);

    for script in [requests, pools] {
        assert_eq!(ask(script, &both, &url(&claims())).await.done().trim(), "hello through the tunnel");
    }
    let open = site.records(Side::Gateway, &json!({"event": "forward.open", "door": "connect"}));
    assert_eq!(open.len(), 2, "{open:?}");
    site.stop().await;
}

#[tokio::test]
async fn a_principals_certificate_stands_for_it_where_the_listener_asks_for_one() {
    let (plan, target) = tls_plan().await;
    let people = Authority::new(plan.path(), "people-ca");
    let uri = |text: &str| vec![SanType::URI(text.try_into().expect("a URI"))];
    let (chain, key) = people.sign("person", uri("caponier://acme/principals/provisioner"), true);
    let (other, other_key) = people.sign("other", uri("caponier://acme/principals/nobody"), true);
    let port = free_port();
    let plan = plan.gateway_setting(&format!(
        "[[listener]]\naddress = \"127.0.0.1:{port}\"\nclient_auth = \"loose\"\nclient_ca = [\"people-ca.pem\"]"
    ));
    let site = plan.start().await;
    let ask = async |chain: &Path, key: &Path, header: &str| {
        let mut command = curl(&site, target);
        command.arg("--proxy-cert").arg(chain).arg("--proxy-key").arg(key).args(["-w", "%{http_connect}"]);
        if !header.is_empty() {
            command.args(["--proxy-header", header]);
        }
        run(command.env("HTTPS_PROXY", format!("https://localhost:{port}"))).await.stdout
    };
    let agent = "Caponier-Agent: acme/prod-eu";
    assert_eq!(ask(&chain, &key, agent).await, "hello through the tunnel200");
    let open = site.record(Side::Gateway, json!({"event": "forward.open", "principal": "provisioner"})).await;
    assert!(open["client_certificate"].as_str().is_some_and(|mark| mark.starts_with("SHA256:")), "{open}");
    for (chain, key, header, reason) in [
        (&chain, &key, "", "token_missing"),
        (&chain, &key, "Caponier-Agent: acme", "malformed_agent"),
        (&chain, &key, "Caponier-Agent: acme/prod-xx", "unknown_agent"),
        (&chain, &key, "Caponier-Agent: globex/prod-eu", "client_certificate_other_name"),
        (&other, &other_key, agent, "client_certificate_other_name"),
    ] {
        assert_eq!(ask(chain, key, header).await, "407", "{header}");
        site.record(Side::Gateway, json!({"event": "auth.refused", "door": "connect", "reason": reason})).await;
    }
    site.stop().await;
}

#[tokio::test]
async fn the_command_prints_a_url_and_nothing_else() {
    let plan = Site::plan();
    let key = plan.key("signer");
    let url = |arguments: &[&str]| {
        let mut command = caponier();
        command.args(["url", AGENT, "--gateway", "gateway.example.com", "--principal", "provisioner"]).args(arguments);
        command
    };
    let (key, ssh) = (key.display().to_string(), plan.key("provisioner").display().to_string());
    for arguments in
        [&["--key", &key][..], &["--identity", &ssh], &["--key", &key, "--target", "db:5432", "--ttl", "7d"]]
    {
        let said = run(&mut url(arguments)).await;
        assert_eq!(said.code(), 0, "{said:?}");
        assert_eq!(said.stdout.lines().count(), 1, "{said:?}");
        assert!(said.stdout.starts_with("https://caponier:"), "{said:?}");
        assert!(said.stdout.trim_end().ends_with("@gateway.example.com:443"), "{said:?}");
        assert!(said.stderr.contains("is a secret"), "{said:?}");
        let token = said.stdout["https://caponier:".len()..].split('@').next().expect("a token").to_owned();
        assert!(!said.stderr.contains(&token), "{said:?}");
    }
    let said = run(&mut url(&["--key", &key, "--json"])).await.done();
    let object: Value = serde_json::from_str(&said).expect("JSON");
    assert!(object["url"].is_string() && object["jti"].is_string() && object["expires"].is_string(), "{object}");
    let ecdsa = plan.path().join("ecdsa");
    run(Command::new("ssh-keygen").args(["-q", "-t", "ecdsa", "-N", "", "-f"]).arg(&ecdsa)).await.done();
    let (ecdsa, public) = (ecdsa.display().to_string(), format!("{key}.pub"));
    for (arguments, problem) in [
        (&["--key", &ecdsa][..], "Ed25519"),
        (&["--key", &public], "public key"),
        (&["--key", "/nonexistent"], "/nonexistent"),
        (&["--key", &key, "--identity", &ssh], "cannot be used with"),
        (&["--ttl", "1h"], "required"),
        (&["--key", &key, "--ttl", "31d"], "30 days"),
        (&["--key", &key, "--ttl", "0s"], "30 days"),
        (&["--key", &key, "--target", "db"], "port"),
        (&["--key", &key, "--principal", "Two Words"], "principal"),
    ] {
        let said = run(&mut url(arguments)).await;
        assert_eq!((said.code(), said.stdout.as_str()), (2, ""), "{arguments:?}: {said:?}");
        assert!(said.stderr.contains(problem), "{arguments:?}: {said:?}");
    }
    assert!(PrivateKey::generate(Algorithm::Ed25519).ed25519_seed().is_some());
}
