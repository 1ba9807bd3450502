//! Every configuration file in `deploy/` loads as it stands, and with every optional setting in it turned on.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use caponier::config::{self, Loaded};
use caponier::identity::{Algorithm, PrivateKey};

/// Copies an example into a folder of its own, with the files that it names beside it, and loads it there.
fn load(name: &str, text: &str) -> Loaded {
    let dir = tempfile::tempdir().expect("temporary directory");
    // The key that a certificate is for stands before it.
    let mut last = None;
    let (mut certified, mut authority) = (None, None);
    let listed = |value: &str| dir.path().join(value.trim_matches(['[', ']', '"']));
    for line in text.lines() {
        let Some((key, value)) = line.split_once(" = ") else { continue };
        let path = dir.path().join(value.trim_matches('"'));
        match key {
            "host_key" | "login_key" | "identity" | "signing_key" => {
                let key = PrivateKey::generate(Algorithm::Ed25519);
                key.write_new(&path).expect("write key");
                last = Some(key);
            }
            "host_certificate" => certify(&path, last.as_ref(), &["-h", "-n", "gateway.example.com"]),
            "login_certificate" => certify(&path, last.as_ref(), &["-n", "acme"]),
            "tls_certificate" => {
                let key = rcgen::KeyPair::generate().expect("key");
                let params = rcgen::CertificateParams::new(vec!["x".to_owned()]).expect("parameters");
                fs::write(&path, params.self_signed(&key).expect("certificate").pem()).expect("write certificate");
                certified = Some(key);
            }
            "tls_key" => {
                let key = certified.take().expect("a certificate before its key");
                fs::write(&path, key.serialize_pem()).expect("write key");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("change mode");
            }
            "client_ca" => authority = Some(make_authority(&listed(value))),
            "client_crl" => {
                let list = revocations(authority.as_ref().expect("a CA before its list"));
                fs::write(listed(value), list).expect("write list");
            }
            "registry" => fs::create_dir(&path).expect("create folder"),
            "known_hosts" => {
                let key = PrivateKey::generate(Algorithm::Ed25519).public().to_openssh();
                fs::write(&path, format!("[gateway.example.com]:443 {key}\n")).expect("write known_hosts");
            }
            "ca_file" | "tls_ca_file" | "proxy_ca_file" => {
                let key = rcgen::KeyPair::generate().expect("key");
                let params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
                fs::write(&path, params.self_signed(&key).expect("certificate").pem()).expect("write certificate");
            }
            "proxy_credentials_file" | "password_file" => {
                fs::write(&path, "user:password\n").expect("write credentials");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("change mode");
            }
            _ => (),
        }
    }
    let file = dir.path().join(name);
    fs::write(&file, text).expect("write example");
    config::load_with(&file, Vec::<(OsString, OsString)>::new()).unwrap_or_else(|faults| panic!("{name}: {faults}"))
}

/// Makes a CA of clients, with its certificate in this file.
fn make_authority(file: &Path) -> Authority {
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    let key = rcgen::KeyPair::generate().expect("key");
    let authority = Authority::self_signed(params, key).expect("certificate");
    fs::write(file, authority.pem()).expect("write certificate");
    authority
}

type Authority = rcgen::CertifiedIssuer<'static, rcgen::KeyPair>;

/// An empty list of its revocations.
fn revocations(authority: &Authority) -> String {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let list = rcgen::CertificateRevocationListParams {
        this_update: (now - hour).into(),
        next_update: (now + hour).into(),
        crl_number: rcgen::SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    list.signed_by(authority).expect("a list").pem().expect("PEM")
}

/// Makes a certificate.
fn certify(path: &Path, key: Option<&PrivateKey>, arguments: &[&str]) {
    let plain = path.to_string_lossy().replace("-cert.pub", ".pub");
    let ca = path.with_extension("ca");
    PrivateKey::generate(Algorithm::Ed25519).write_new(&ca).expect("write key");
    key.expect("a key").write_public_new(Path::new(&plain)).expect("write key");
    let mut keygen = std::process::Command::new("ssh-keygen");
    keygen.args(["-q", "-I", "example", "-s"]).arg(ca).args(arguments).arg(plain);
    assert!(keygen.status().expect("ssh-keygen runs").success());
}

/// Turns on what stands as `#key = value`; prose has a space after the `#`.
fn all_settings(text: &str) -> String {
    let on = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|first: char| first.is_ascii_lowercase()) => format!("{rest}\n"),
        _ => format!("{line}\n"),
    };
    text.lines().map(on).collect()
}

fn examples() -> Vec<PathBuf> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut paths: Vec<_> = fs::read_dir(deploy)
        .expect("deploy/")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    paths.sort();
    paths
}

#[test]
fn every_example_loads() {
    let examples = examples();
    assert!(examples.len() >= 3, "the examples are gone");
    for path in examples {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).expect("read example");
        let all = all_settings(&text);
        assert_ne!(text, all, "{name} shows no optional setting");
        load(&name, &text);
        load(&name, &all);
    }
}

#[test]
fn what_an_example_turns_on_is_used() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let text = fs::read_to_string(deploy.join("agent.toml")).expect("read example");
    let Loaded::Agent(agent, _) = load("agent.toml", &all_settings(&text)) else { panic!("an agent") };
    assert_eq!(agent.replica.as_str(), "host-1");
    assert_eq!(agent.limits, caponier::agent::Limits::default(), "what an example says it would do");
    assert!(agent.egress.proxy().is_some_and(|proxy| proxy.credentials.is_some()));
    let text = fs::read_to_string(deploy.join("gateway.toml")).expect("read example");
    let Loaded::Gateway(gateway, _) = load("gateway.toml", &all_settings(&text)) else { panic!("a gateway") };
    assert!(gateway.admin_socket.is_some());
    assert_eq!(gateway.limits, caponier::gateway::Limits::default(), "what an example says it would do");
    assert_eq!(gateway.local.len(), 1);
    let text = fs::read_to_string(deploy.join("proxy.toml")).expect("read example");
    let all = all_settings(&text);
    let Loaded::Proxy(proxy, _) = load("proxy.toml", &all) else { panic!("a proxy") };
    assert_eq!(proxy.limits, caponier::proxy::Limits::default(), "what an example says it would do");
    assert_eq!((proxy.listeners.len(), proxy.upstreams.len()), (3, 2));
    assert!(proxy.health.listen.is_some() && proxy.health.metrics.is_some() && proxy.egress.proxy().is_some());
    let text = fs::read_to_string(deploy.join("resources.toml")).expect("read example");
    let Loaded::Resources(config) = load("resources.toml", &all_settings(&text)) else { panic!("resources") };
    assert!(config.client.egress.proxy().is_some_and(|proxy| proxy.credentials.is_some()));
    assert!(config.resources.instance.password.is_some());
    let database = &config.resources.databases[0];
    assert_eq!((database.connection_limit, database.extensions.len(), database.grants.len()), (Some(50), 1, 2));
    assert_eq!(config.resources.roles[0].member_of.len(), 1);
}
