//! One port for SSH, TLS and HTTP: which of them a connection speaks, what TLS is spoken, which requests are taken, and that
//! whoever dawdles, lies or floods costs nobody else anything.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use caponier::limits;
use caponier::tls::{self, ALPN_HTTP, ALPN_SSH, ClientOptions, TlsStream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::harness::{
    Plan, SOON, Said, Side, Site, caponier, connect, echo, echoes, eventually, free_port, read_to_end, run, within,
};

/// The name of the gateway's first certificate.
const NAME: &str = "gateway.example.com";

/// The name of its second.
const OTHER: &str = "other.example.com";

/// What certifies the gateway.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new one, whose certificate is `ca.pem` in `folder`.
    pub(crate) fn new(folder: &Path) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let authority = Self(CertifiedIssuer::self_signed(params, key).expect("an authority"));
        fs::write(folder.join("ca.pem"), authority.0.pem()).expect("written");
        authority
    }

    /// A certificate for `name`, whose subject is `subject`, and its key, in PEM.
    fn certify(&self, name: &str, subject: &str) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("params");
        params.distinguished_name.push(DnType::CommonName, subject);
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// The same as `FILE.pem` and `FILE.key`.
    pub(crate) fn write(&self, folder: &Path, file: &str, name: &str, subject: &str) {
        let (certificate, key) = self.certify(name, subject);
        fs::write(folder.join(format!("{file}.pem")), certificate).expect("written");
        write_key(&folder.join(format!("{file}.key")), &key);
    }
}

fn write_key(path: &Path, key: &str) {
    fs::write(path, key).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("a mode");
}

/// A site whose gateway speaks TLS.
fn plan() -> (Plan, Authority) {
    let plan = Site::plan();
    let authority = Authority::new(plan.path());
    authority.write(plan.path(), "one", NAME, "the first");
    authority.write(plan.path(), "two", OTHER, "the second");
    let table = |file: &str| format!("[[certificate]]\nchain = \"{file}.pem\"\nkey = \"{file}.key\"");
    (plan.gateway_table(&table("one")).gateway_table(&table("two")), authority)
}

/// `openssl s_client` toward the gateway.
async fn s_client(site: &Site, arguments: &[&str]) -> Said {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &site.address.to_string(), "-CAfile"]).arg(site.path().join("ca.pem"));
    run(command.args(["-verify_return_error", "-verify_hostname", NAME]).args(arguments)).await
}

/// TLS with the gateway, over a connection that was made before.
async fn secure(site: &Site, alpn: &'static [&'static [u8]], stream: TcpStream) -> TlsStream<TcpStream> {
    let options = ClientOptions { ca_files: vec![site.path().join("ca.pem")], identity: None, alpn };
    let config = options.build().expect("a client");
    let name = NAME.parse().expect("a host");
    within("TLS", tls::connect(&config, &name, stream)).await.expect("TLS")
}

async fn dial(site: &Site) -> TcpStream {
    TcpStream::connect(site.address).await.expect("connected")
}

fn refusals(site: &Site, reason: &str) -> Vec<Value> {
    site.records(Side::Gateway, &json!({"event": "auth.refused", "reason": reason}))
}

/// Reads what comes until the end, however that comes.
async fn answer(mut stream: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut all = Vec::new();
    // Some are cut off without a word of TLS about it, and that is no matter here.
    drop(within("an answer", stream.read_to_end(&mut all)).await);
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn the_end_of_the_gateways_own_certificate_is_told_before_it_comes_and_after() {
    let (plan, authority) = plan();
    let (dir, days) = (plan.path().to_owned(), |days: u64| Duration::from_secs(days * 24 * 3600));
    let put = |file: &str, begins: SystemTime, ends: SystemTime| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![NAME.to_owned()]).expect("params");
        (params.not_before, params.not_after) = (begins.into(), ends.into());
        let certificate = params.signed_by(&key, &authority.0).expect("a certificate");
        fs::write(dir.join(format!("{file}.pem")), certificate.pem()).expect("written");
        write_key(&dir.join(format!("{file}.key")), &key.serialize_pem());
    };
    let now = SystemTime::now();
    put("one", now - days(80), now + days(6));
    put("two", now + days(2), now + days(90));
    let mut site = plan.start_gateway().await;
    let gateway = Side::Gateway;
    site.program(gateway).says("[[certificate]] SHA256:").await;
    site.program(gateway).says("have it signed anew").await;
    site.program(gateway).says("until then clients refuse it: look at the clock").await;
    let checked = run(caponier().arg("check").arg(site.config(gateway))).await;
    assert_eq!(checked.code(), 0, "{checked:?}");
    assert!(
        checked.stderr.contains("have it signed anew") && checked.stderr.contains("look at the clock"),
        "{checked:?}"
    );

    // One whose time is over is no fault that would keep others from being served.
    put("one", now - days(80), now - days(1));
    site.program(gateway).says("and clients refuse it: put a new one in its place").await;
    site.stop().await;
}

#[tokio::test]
async fn nothing_below_tls_1_2_and_no_weak_suite_is_spoken() {
    let (plan, _) = plan();
    let mut site = plan.start_gateway().await;
    // Without this, the library itself would speak none of them.
    let any = "ALL:@SECLEVEL=0";
    for arguments in [
        &["-tls1_3"][..],
        &["-tls1_2"],
        &["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"],
        &["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"],
        &["-tls1_3", "-groups", "P-256"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"],
    ] {
        let said = s_client(&site, arguments).await;
        assert!(said.status.success() && said.stdout.contains("Verify return code: 0"), "{arguments:?}: {said:?}");
    }
    for arguments in [
        &["-tls1", "-cipher", any][..],
        &["-tls1_1", "-cipher", any],
        &["-tls1_2", "-cipher", "AES128-SHA:AES256-GCM-SHA384:@SECLEVEL=0"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA384:@SECLEVEL=0"],
        &["-tls1_2", "-cipher", "DHE-RSA-AES256-GCM-SHA384:ADH-AES128-SHA:NULL:@SECLEVEL=0"],
        &["-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_SHA256"],
        &["-tls1_3", "-groups", "P-521"],
        &["-alpn", "h2"],
    ] {
        let said = s_client(&site, arguments).await;
        let refused = !said.status.success() && said.stdout.contains("no peer certificate available");
        assert!(refused, "{arguments:?}: {said:?}");
    }
    eventually("records", async || (refusals(&site, "tls_handshake").len() >= 5).then_some(())).await;
    for (alpn, agreed) in [("caponier/1", "caponier/1"), ("http/1.1", "http/1.1"), ("h2,http/1.1", "http/1.1")] {
        let said = s_client(&site, &["-alpn", alpn]).await;
        assert!(said.stdout.contains(&format!("ALPN protocol: {agreed}")), "{said:?}");
    }
    let said = s_client(&site, &["-tls1_2", "-reconnect"]).await;
    assert!(!said.stdout.contains("Reused"), "a session was resumed: {said:?}");
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
}

#[tokio::test]
async fn a_certificate_is_picked_by_name_and_a_renewed_one_is_taken_up_whole() {
    let (plan, authority) = plan();
    let mut site = plan.start_gateway().await;
    let subject = async |site: &Site, arguments: &[&str], name: &str| {
        let said = s_client(site, &[arguments, &["-verify_hostname", name]].concat()).await;
        said.stdout.lines().find_map(|line| line.strip_prefix("subject=")).map(str::to_owned)
    };
    for (arguments, name, expected) in [
        (&["-servername", NAME][..], NAME, "the first"),
        (&["-servername", OTHER], OTHER, "the second"),
        (&["-servername", "unknown.example.com"], NAME, "the first"),
        (&["-noservername"], NAME, "the first"),
    ] {
        let shown = subject(&site, arguments, name).await.expect("a subject");
        assert!(shown.contains(expected), "{arguments:?}: {shown}");
    }
    // Half of a pair: the old one stays, and that is said.
    let (certificate, key) = authority.certify(OTHER, "the third");
    fs::write(site.path().join("two.pem"), certificate).expect("written");
    site.record(Side::Gateway, json!({"event": "config.rejected"})).await;
    site.program(Side::Gateway).says("is not that of the certificate").await;
    assert!(subject(&site, &["-servername", OTHER], OTHER).await.expect("a subject").contains("the second"));
    write_key(&site.path().join("two.key"), &key);
    eventually("the renewed certificate", async || {
        subject(&site, &["-servername", OTHER], OTHER).await.filter(|subject| subject.contains("the third"))
    })
    .await;
    let like = json!({"event": "config.reloaded", "detail": "changed: certificates"});
    site.record(Side::Gateway, like).await;
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
}

#[tokio::test]
async fn stock_ssh_comes_in_by_tls_and_a_silent_client_gets_our_line_there_too() {
    let target = echo().await;
    let (plan, _) = plan();
    let site = plan.allow(target).start().await;
    let port = free_port();
    let tunnel = format!(
        "ProxyCommand=openssl s_client -quiet -verify_quiet -verify_return_error -CAfile {} -verify_hostname {NAME} -connect {}",
        site.path().join("ca.pem").display(),
        site.address
    );
    let ssh = site.ssh(&["-N", "-v", "-o", &tunnel, "-L", &format!("127.0.0.1:{port}:{target}")]);
    let mut ssh = site.background("in-tls", ssh);
    ssh.says("Entering interactive session").await;
    let mut stream = connect(SocketAddr::from(([127, 0, 0, 1], port))).await;
    echoes(&mut stream, &vec![7; 300_000]).await;
    site.record(Side::Gateway, json!({"event": "auth.accepted", "transport": "tls"})).await;
    site.record(Side::Gateway, json!({"event": "link.up", "transport": "ssh"})).await;
    for alpn in [&[][..], &[ALPN_SSH]] {
        let mut silent = secure(&site, alpn, dial(&site).await).await;
        let mut line = [0; 20];
        within("our line", silent.read_exact(&mut line)).await.expect("our line");
        assert_eq!(&line, b"SSH-2.0-caponier_1\r\n");
    }
    // Whoever has said that it speaks HTTP gets nothing it has not asked for.
    let mut silent = secure(&site, &[ALPN_HTTP], dial(&site).await).await;
    let nothing = tokio::time::timeout(limits::IDENTIFICATION_PATIENCE * 2, silent.read_u8()).await;
    assert!(nothing.is_err(), "{nothing:?}");
    drop((silent, stream, ssh));
    site.stop().await;
}

const GET: &str = "GET /x HTTP/1.1\r\nHost: g\r\n\r\n";

#[tokio::test]
async fn what_is_agreed_on_is_what_is_spoken_and_tls_has_one_layer() {
    let (plan, _) = plan();
    let mut site = plan.start_gateway().await;
    for (alpn, bytes, reason) in [
        (&[ALPN_SSH][..], GET.as_bytes(), "other_protocol_than_agreed"),
        (&[ALPN_HTTP], b"SSH-2.0-x\r\n", "other_protocol_than_agreed"),
        (&[], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "tls_in_tls"),
        (&[], b"\0\0\0\0", "identification"),
        (&[], GET.as_bytes(), "http_not_found"),
    ] {
        let before = refusals(&site, reason).len();
        let mut stream = secure(&site, alpn, dial(&site).await).await;
        stream.write_all(bytes).await.expect("written");
        stream.flush().await.expect("flushed");
        let said = answer(stream).await;
        let expected = if reason == "http_not_found" { "HTTP/1.1 404 Not Found\r\n" } else { "" };
        assert!(said.starts_with(expected) && (said.is_empty() == expected.is_empty()), "{reason}: {said}");
        eventually(reason, async || (refusals(&site, reason).len() > before).then_some(())).await;
    }
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
}

#[tokio::test]
async fn without_a_certificate_there_is_no_tls() {
    let mut site = Site::plan().start_gateway().await;
    Authority::new(site.path());
    let said = s_client(&site, &[]).await;
    assert!(!said.status.success(), "{said:?}");
    eventually("a record", async || refusals(&site, "no_tls_here").pop()).await;
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
}

/// What others have been led to read as two requests, or as another one.
#[tokio::test]
async fn requests_that_two_readers_could_take_differently_are_refused() {
    let (plan, _) = plan();
    let mut site = plan.start_gateway().await;
    let connect = |header: &str| format!("CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n{header}\r\n\r\n");
    let long = "x".repeat(limits::HTTP_HEAD_MAX);
    for (what, request, status) in [
        ("two hosts", connect("Host: other:1"), 400),
        ("no host", "CONNECT db:5432 HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("two lengths", connect("Content-Length: 0\r\nContent-Length: 9"), 400),
        ("a body", connect("Content-Length: 9"), 400),
        ("a length and chunks", connect("Content-Length: 0\r\nTransfer-Encoding: chunked"), 400),
        ("chunks in disguise", connect("Transfer-Encoding:\u{b}chunked"), 400),
        ("a header over two lines", connect("X: 1\r\n Host: other"), 400),
        ("LF alone", "CONNECT db:5432 HTTP/1.1\nHost: db:5432\n\n".to_owned(), 400),
        ("CR alone", connect("X: 1\rHost: other"), 400),
        ("NUL", connect("X: \0"), 400),
        ("a space before the colon", connect("Host : other"), 400),
        ("absolute form", "GET http://db/ HTTP/1.1\r\nHost: db\r\n\r\n".to_owned(), 400),
        ("a user in the target", "CONNECT u@db:1 HTTP/1.1\r\nHost: db:1\r\n\r\n".to_owned(), 400),
        ("a head without an end", format!("GET /{long}"), 431),
        ("a thousand headers", format!("GET / HTTP/1.1\r\n{}", "X: 1\r\n".repeat(1_000)), 431),
    ] {
        for in_tls in [false, true] {
            let before = refusals(&site, "http_head").len();
            let mut stream = dial(&site).await;
            let said = if in_tls {
                let mut stream = secure(&site, &[ALPN_HTTP], stream).await;
                drop(stream.write_all(request.as_bytes()).await);
                drop(stream.flush().await);
                answer(stream).await
            } else {
                drop(stream.write_all(request.as_bytes()).await);
                answer(stream).await
            };
            assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {said}");
            assert_eq!(said.matches("HTTP/1.1").count(), 1, "{what}: {said}");
            // Of so many at once not each is recorded by itself.
            if before < 20 {
                eventually(what, async || (refusals(&site, "http_head").len() > before).then_some(())).await;
            }
        }
    }
    // Two requests in one go: the first is refused, and the second never looked at.
    let mut stream = secure(&site, &[ALPN_HTTP], dial(&site).await).await;
    stream.write_all(connect("X: 1").repeat(2).as_bytes()).await.expect("written");
    stream.flush().await.expect("flushed");
    let said = answer(stream).await;
    assert!(said.starts_with("HTTP/1.1 407 ") && said.matches("HTTP/1.1").count() == 1, "{said}");
    for request in ["GET /healthz HTTP/1.0\r\n\r\n", "GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n"] {
        let mut stream = dial(&site).await;
        stream.write_all(request.as_bytes()).await.expect("written");
        let said = answer(stream).await;
        assert!(said.starts_with("HTTP/1.1 200 OK\r\n") && said.ends_with("\r\n\r\nok\n"), "{said}");
    }
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
}

/// An address of a balancer that passes connections on, and one of a balancer that ends TLS.
const PASSES: &str = "127.0.0.9";
const ENDS: &str = "127.0.0.10";

async fn connect_from(from: &str, address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(from.parse().expect("an address"), 0)).expect("bound");
    within("a connection", socket.connect(address)).await.expect("connected")
}

#[tokio::test]
async fn http_in_clear_is_for_this_host_and_named_balancers_alone() {
    let table = format!(
        "[[listener]]\naddress = \"127.0.0.3:0\"\nproxy_protocol_from = [\"{PASSES}/32\"]\n\
         tls_terminated_by = [\"{ENDS}/32\"]\naccept_from = [\"192.0.2.0/24\", \"127.0.0.0/8\"]"
    );
    let mut site = Site::plan().gateway_table(&table).start_gateway().await;
    let line = site.program(Side::Gateway).says(" listening on 127.0.0.3:").await;
    let address: SocketAddr = line.rsplit_once(' ').expect("an address").1.parse().expect("an address");
    let connect = "CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\nProxy-Authorization: Bearer hunter2.x.y\r\n";
    let for_client = |client: &str| format!("{connect}X-Forwarded-For: {client}\r\n\r\n");
    let header = "PROXY TCP4 192.0.2.7 127.0.0.3 1111 443\r\n";
    let beyond = "PROXY TCP4 127.0.0.1 127.0.0.3 1111 443\r\n";
    let health = "GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n";
    for (what, from, request, status, reason) in [
        ("this host", "127.0.0.2", format!("{connect}\r\n"), "407", "token_malformed"),
        ("a client behind a balancer", PASSES, format!("{header}{connect}\r\n"), "426", "http_in_clear"),
        ("its health", PASSES, format!("{header}{health}"), "426", "http_in_clear"),
        ("one that is said to be this host", PASSES, format!("{beyond}{connect}\r\n"), "426", "http_in_clear"),
        ("half a head", PASSES, format!("{header}CONNECT db:5432 HT"), "426", "http_in_clear"),
        ("who has ended TLS", ENDS, for_client("192.0.2.8"), "407", "token_malformed"),
        ("it adds to what was said", ENDS, for_client("127.0.0.1, 192.0.2.9"), "407", "token_malformed"),
        ("it does not say for whom", ENDS, format!("{connect}\r\n"), "400", "forwarded_for"),
        ("it says nothing that could be", ENDS, for_client("192.0.2.8, unknown"), "400", "forwarded_for"),
        ("from a network that may not come", ENDS, for_client("198.51.100.1"), "", "source_network"),
        ("its own health", ENDS, health.to_owned(), "200", ""),
    ] {
        let before = refusals(&site, reason).len();
        let mut stream = connect_from(from, address).await;
        stream.write_all(request.as_bytes()).await.expect("written");
        let said = answer(stream).await;
        let expected = if status.is_empty() { String::new() } else { format!("HTTP/1.1 {status} ") };
        assert!(said.starts_with(&expected) && said.is_empty() == expected.is_empty(), "{what}: {said}");
        if !reason.is_empty() {
            eventually(what, async || (refusals(&site, reason).len() > before).then_some(())).await;
        }
    }
    for client in ["192.0.2.8:0", "192.0.2.9:0"] {
        site.record(Side::Gateway, json!({"event": "auth.refused", "door": "connect", "client": client})).await;
    }
    // SSH and TLS are a balancer's own affair, as they are anybody's.
    let mut stream = connect_from(ENDS, address).await;
    stream.write_all(b"SSH-2.0-x\r\n").await.expect("written");
    let mut line = [0; 20];
    within("our line", stream.read_exact(&mut line)).await.expect("our line");
    drop(stream);
    for log in
        [site.program(Side::Gateway).log(), fs::read_to_string(site.path().join("gateway.jsonl")).expect("a trail")]
    {
        assert!(!log.contains("hunter2"), "a token was written down: {log}");
    }
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).ended().await;
}

/// The memory of a process that is there, in kilobytes.
fn memory(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// What it is, what is agreed on where there is TLS, what is sent at first, and what then from time to time.
type Stage<'a> = (&'static str, Option<&'static [&'static [u8]]>, &'a [u8], u8);

/// Whoever sends a byte from time to time holds a seat for the time of a login and no longer, at whichever stage; and
/// whoever sends all that it may makes the gateway hold what a login may.
#[tokio::test]
async fn who_dawdles_at_any_stage_is_hung_up_on_in_time_and_costs_little() {
    let target = echo().await;
    let (plan, _) = plan();
    let mut site = plan.allow(target).door(target).start().await;
    let pid = site.program(Side::Gateway).pid();
    let before = memory(pid);
    let hello = [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], &[7; 200]].concat();
    let head = format!("CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\nX: {}", "x".repeat(8_000));
    let stages: [Stage<'_>; 6] = [
        ("one letter of SSH", None, b"S", b'S'),
        ("half a hello", None, &hello, 7),
        ("half a head in clear", None, head.as_bytes(), b'x'),
        ("TLS, and a letter", Some(&[]), b"SSH-2.0-", b'x'),
        ("half a head in TLS", Some(&[ALPN_HTTP]), head.as_bytes(), b'x'),
        ("nothing in TLS", Some(&[ALPN_HTTP]), b"", 0),
    ];
    let site = Arc::new(site);
    let sent = Arc::new(Semaphore::new(0));
    let mut dawdling = tokio::task::JoinSet::new();
    let began = Instant::now();
    for (what, alpn, bytes, drip) in stages {
        for _ in 0..8 {
            let (site, sent, bytes) = (site.clone(), sent.clone(), bytes.to_vec());
            let dawdle = async move {
                let stream = dial(&site).await;
                let (mut read, mut write): (
                    Box<dyn tokio::io::AsyncRead + Send + Unpin>,
                    Box<dyn tokio::io::AsyncWrite + Send + Unpin>,
                ) = match alpn {
                    Some(alpn) => {
                        let (read, write) = tokio::io::split(secure(&site, alpn, stream).await);
                        (Box::new(read), Box::new(write))
                    }
                    None => {
                        let (read, write) = stream.into_split();
                        (Box::new(read), Box::new(write))
                    }
                };
                let dripping = async {
                    drop(write.write_all(&bytes).await);
                    drop(write.flush().await);
                    sent.add_permits(1);
                    loop {
                        sleep(Duration::from_millis(500)).await;
                        if drip != 0 {
                            drop(write.write_all(&[drip]).await);
                            drop(write.flush().await);
                        }
                    }
                };
                let mut all = Vec::new();
                tokio::select! {
                    () = dripping => {}
                    _ = read.read_to_end(&mut all) => {}
                }
                (what, began.elapsed())
            };
            dawdling.spawn(dawdle);
        }
    }
    // Whatever they may send has been sent; what the gateway makes of it is looked at until the last has gone.
    drop(within("all of them to have sent it", sent.acquire_many(48)).await.expect("not closed"));
    let grown = || memory(pid).saturating_sub(before);
    let mut most = grown();
    echoes(connect(site.doors[0]).await, b"others are served").await;
    within("all of them to be hung up on", async {
        while let Some(ended) = dawdling.join_next().await {
            most = most.max(grown());
            let (what, after) = ended.expect("no panic");
            let late = limits::LOGIN_GRACE + SOON;
            assert!(after < late, "{what}: {after:?}");
        }
    })
    .await;
    assert!(most < 48 * 200, "{most} KiB for 48 connections without a login");
    for reason in ["tls_timeout", "http_head", "identification"] {
        eventually(reason, async || refusals(&site, reason).pop()).await;
    }
    Arc::into_inner(site).expect("nobody else has it").stop().await;
}

#[tokio::test]
async fn garbage_after_any_beginning_ends_one_connection_and_nothing_else() {
    let target = echo().await;
    let (plan, _) = plan();
    let site = plan.allow(target).door(target).start().await;
    let mut noise = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = |length: usize| -> Vec<u8> {
        let byte = |_| {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise.to_le_bytes()[0]
        };
        (0..length).map(byte).collect()
    };
    for begins in [
        &b""[..],
        b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03",
        b"\x16\x03\x03\x00\x04\x01\0\0\0",
        b"GET ",
        b"CONNECT ",
    ] {
        for length in [1, 100, 70_000] {
            let mut stream = dial(&site).await;
            drop(stream.write_all(&[begins, &bytes(length)].concat()).await);
            drop(stream.shutdown().await);
            let said = read_to_end(stream).await;
            // An alert, or a reply, or nothing.
            assert!(said.len() < 300, "{begins:?}: {said:?}");
            let mut stream = secure(&site, &[], dial(&site).await).await;
            drop(stream.write_all(&[begins, &bytes(length)].concat()).await);
            drop(stream.shutdown().await);
            answer(stream).await;
        }
    }
    eventually("a record", async || refusals(&site, "tls_handshake").pop()).await;
    echoes(connect(site.doors[0]).await, b"others are served").await;
    site.stop().await;
}
