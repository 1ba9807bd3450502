//! Tests of the module above.

use super::*;
use crate::audit::{Fsync, Rotation, SinkConfig, SinkKind, Sinks};
use crate::identity::{Algorithm, PrivateKey};
use crate::resolve;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use tempfile::TempDir;

/// A folder with key files, and a public key for the agent's configuration.
struct Place {
    dir: TempDir,
    orchestrator: String,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        for name in ["host", "login-acme", "login-globex", "exposed"] {
            PrivateKey::generate(Algorithm::Ed25519).write_new(&dir.path().join(name)).expect("write key");
        }
        let place = Self { dir, orchestrator: public() };
        place.write("garbage", "not a key", 0o600);
        place.write("credentials", "user:hunter2\n", 0o600);
        place.write("credentials-of-all", "user:hunter2\n", 0o644);
        place.write("credentials-of-two", "user:hunter2\nother:hunter2\n", 0o600);
        std::fs::set_permissions(place.dir.path().join("exposed"), std::fs::Permissions::from_mode(0o640))
            .expect("change mode");
        std::fs::create_dir(place.dir.path().join("registry")).expect("create folder");
        place
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("write");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("change mode");
    }

    fn agent(&self) -> String {
        let key = &self.orchestrator;
        [
            "[agent]",
            "id = \"prod-eu\"",
            "host_key = \"host\"",
            "[audit]",
            "file = \"trail.jsonl\"",
            "[[organisation]]",
            "id = \"acme\"",
            "gateways = [\"ssh://gateway.example.com\"]",
            "[[organisation.orchestrator]]",
            &format!("key = \"{key}\""),
            "asserts = [\"provisioner\", \"ci-*\"]",
            "[[organisation.allow]]",
            "name = \"orders-db\"",
            "hosts = [\"orders.db.internal\"]",
            "within = [\"10.20.0.0/16\"]",
            "ports = [5432]",
            "principals = [\"provisioner\"]",
            "[[organisation.allow]]",
            "name = \"legacy\"",
            "addresses = [\"10.30.4.7/32\"]",
            "ports = [3306]",
        ]
        .join("\n")
    }

    fn gateway(&self) -> String {
        [
            "[gateway]",
            "listen = [\"0.0.0.0:443\"]",
            "host_key = \"host\"",
            "registry = \"registry\"",
            "[audit]",
            "stdout = true",
            "[[organisation]]",
            "id = \"acme\"",
            "login_key = \"login-acme\"",
            "[[organisation]]",
            "id = \"globex\"",
            "login_key = \"login-globex\"",
            "[[local]]",
            "listen = \"127.0.0.1:15432\"",
            "agent = \"acme/prod-eu\"",
            "target = \"orders.db.internal:5432\"",
            "principal = \"provisioner\"",
        ]
        .join("\n")
    }

    fn resources(&self) -> String {
        [
            "[provision]",
            "gateway = \"ssh://gateway.example.com\"",
            "agent = \"acme/prod-eu\"",
            "identity = \"host\"",
            "host_key_fingerprint = \"SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8\"",
            "output = \"credentials.json\"",
            "[instance]",
            "host = \"orders.db.internal\"",
            "user = \"provisioner\"",
            "port = 5432",
            "[[database]]",
            "name = \"orders\"",
            "[[database.extension]]",
            "name = \"pgcrypto\"",
            "schema = \"extensions\"",
            "[[database.grant]]",
            "role = \"reader\"",
            "privileges = [\"connect\", \"temporary\"]",
            "[[role]]",
            "name = \"reader\"",
        ]
        .join("\n")
    }

    fn load(&self, text: &str, variables: &[(&str, &str)]) -> Result<Loaded, Faults> {
        self.write("config.toml", text, 0o644);
        let variables = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        load_with(&self.dir.path().join("config.toml"), variables)
    }

    fn load_agent(&self, variables: &[(&str, &str)]) -> agent::Config {
        match self.load(&self.agent(), variables) {
            Ok(Loaded::Agent(config, _)) => *config,
            other => panic!("{other:?}"),
        }
    }

    /// Puts `lines` in the place of line `line` (from 1) and expects this fault, at that line, and only it.
    fn refuses(&self, good: &str, line: usize, lines: &str, at: usize, problem: &str) {
        let mut text: Vec<&str> = good.lines().collect();
        text.splice(line - 1..line, lines.split('\n'));
        let faults = match self.load(&text.join("\n"), &[]) {
            Ok(_) => panic!("{lines}: accepted"),
            Err(faults) => faults.to_string(),
        };
        assert_eq!(faults.lines().count(), 1, "{lines}: {faults}");
        let expected = format!("config.toml:{at}: ");
        assert!(faults.contains(&expected) && faults.contains(problem), "{lines}: {faults} | {expected}{problem}");
        assert!(!faults.contains("hunter2"), "{faults}");
    }
}

fn public() -> String {
    PrivateKey::generate(Algorithm::Ed25519).public().to_openssh()
}

#[test]
fn faults_of_an_agent_are_found_where_they_are() {
    let place = Place::new();
    let good = place.agent();
    let key = |key: &str| format!("key = \"{}\"", key.trim_end().replace('\n', "\\n"));
    let other = key(&public());
    let private = key(PrivateKey::generate(Algorithm::Ed25519).to_openssh().expose());
    let host = PrivateKey::read(&place.dir.path().join("host")).expect("host key").public();
    let again = good.lines().skip(11).take(6).collect::<Vec<_>>().join("\n");
    let many: Vec<_> = (1..10).map(|port| format!("\"ssh://g:{port}\"")).collect();
    let deny = |rest: &str| format!("ports = [1]\n[[organisation.deny]]\nname = \"no-x\"\n{rest}");
    let second = |id: &str, key: &str| {
        format!(
            "ports = [1]\n[[organisation]]\nid = \"{id}\"\ngateways = [\"ssh://g\"]\n[[organisation.orchestrator]]\n{key}"
        )
    };
    for (line, lines, at, problem) in [
        (2, "id = \"Prod\"", 2, "agent.id: agent ids are"),
        (2, "", 1, "agent.id: this key is missing"),
        (2, "id = \"a\"\nhostkey = 1", 3, "agent.hostkey: unknown key: did you mean host_key?"),
        (2, "id = \"a\"\nreplica = \"a b\"", 3, "agent.replica: replica ids are"),
        (3, "host_key = \"absent\"", 3, "agent.host_key: key file"),
        (3, "host_key = \"garbage\"", 3, "is not a key"),
        (3, "host_key = \"exposed\"", 3, "chmod 600"),
        (3, "host_key = \".\"", 3, "is not a regular file"),
        (3, "host_key = \"host\"\nproxy = \"socks4://u:hunter2@p:1\"", 4, "a proxy is written http://"),
        (3, "host_key = \"host\"\nproxy = \"http://u:hunter2@:1\"", 4, "the host or port"),
        (3, "host_key = \"host\"\nproxy_credentials_file = \"credentials\"", 4, "credentials without a proxy"),
        (3, "host_key = \"host\"\nproxy_ca_file = \"ca.pem\"", 4, "authorities without a proxy"),
        (3, "host_key = \"host\"\nproxy = \"http://p:1\"\nproxy_ca_file = \"ca.pem\"", 5, "for a proxy of https://"),
        (3, "host_key = \"host\"\nproxy = \"https://p:1\"\nproxy_ca_file = \"absent\"", 5, "could not read the cert"),
        (3, "host_key = \"host\"\nproxy = \"https://p:1\"\nproxy_ca_file = \"garbage\"", 5, "no PEM certificate"),
        (3, "host_key = \"host\"\nproxy = \"http://p:1\"\nno_proxy = [\"a\", \"b.*\"]", 5, "no_proxy[1]: a host (db"),
        (3, "host_key = \"host\"\nproxy = \"http://p:1\"\nno_proxy = 1", 5, "a list"),
        (
            3,
            "host_key = \"host\"\nproxy = \"http://p:1\"\nproxy_credentials_file = \"credentials-of-all\"",
            5,
            "can be read by others (mode 0644)",
        ),
        (
            3,
            "host_key = \"host\"\nproxy = \"http://p:1\"\nproxy_credentials_file = \"credentials-of-two\"",
            5,
            "one line USER:PASSWORD",
        ),
        (3, "host_key = \"host\"\nproxy = \"http://p:1\"\nproxy_credentials_file = \"absent\"", 5, "cannot be read"),
        (
            3,
            "host_key = \"host\"\nproxy = \"http://u:hunter2@p:1\"\nproxy_credentials_file = \"credentials\"",
            5,
            "choose one of the two",
        ),
        (5, "", 4, "audit.file: nowhere to write to"),
        (5, "stdout = false", 4, "audit.file: nowhere to write to"),
        (5, "file = \"t\"\nstdout = true", 6, "choose one"),
        (7, "id = \"a/b\"", 7, "organisation ids are"),
        (8, "gateways = []", 8, "at least one element"),
        (8, "gateways = [\"https://g:443\"]", 8, "organisation[0].gateways[0]: a gateway is written ssh://"),
        (8, "gateways = [\"ws://g:80\"]", 8, "organisation[0].gateways[0]: ws:// is clear text"),
        (
            8,
            "gateways = [\"ssh://g\", [\"tls://h\",\n\"wss://hunter2@h\"]]",
            9,
            "gateways[1][1]: a gateway's URL holds no user",
        ),
        (8, "gateways = [[]]", 8, "gateways[0]: at least one element"),
        (8, "gateways = [7]", 8, "gateways[0]: a list is wanted"),
        (8, &format!("gateways = [[{}]]", many.join(",")), 8, "gateways[0]: more than 8 ways"),
        (
            8,
            "gateways = [\"tls://g\", [\"ssh://g\",\n\"tls://g\"]]",
            9,
            "gateway tls://g:443 is there already, at line 8",
        ),
        (8, "gateways = [\"ssh://g\",\n\"ssh://g:443\"]", 9, "gateway ssh://g:443 is there already, at line 8"),
        (10, "key = \"x\"", 10, "organisation[0].orchestrator[0].key: this is not a key"),
        (10, &private, 10, "this is a private key where a public key belongs"),
        (10, &key(&host.to_openssh()), 10, "this key is the agent's host key too (at line 3)"),
        (11, "asserts = []", 11, "at least one element"),
        (11, "asserts = [\"*\", \"A\"]", 11, "asserts[1]: patterns for ids are"),
        (13, "name = \"a b\"", 13, "a rule's name is"),
        (14, "hosts = [\"10.1.2.3\"]", 14, "make a rule with addresses"),
        (14, "hosts = [\"0177.0.0.1\"]", 14, "make a rule with addresses"),
        (14, "hosts = [\"*\"]", 14, "the last label must be spelt out"),
        (14, "hosts = [\"db.**\"]", 14, "the last label must be spelt out"),
        (14, "hosts = [\"orders*.internal\"]", 14, "a wildcard is a whole label"),
        (14, "hosts = [\"10.20.*\"]", 14, "make a rule with addresses"),
        (14, "hosts = [\"büro.internal\"]", 14, "the host has a character"),
        (14, "hosts = [\"_pg._tcp.internal\"]", 14, "_pg._tcp.internal is the name of a service"),
        (14, "services = [\"db.internal\"]", 14, "db.internal is not the name of a service"),
        (14, "services = [\"*._tcp.internal\"]", 14, "the host has a character"),
        (14, "services = []", 14, "at least one element"),
        (14, "hosts = [\"db\"]\nservices = [\"_pg._tcp.internal\"]", 15, "hosts and services in one rule"),
        (14, "hosts = []", 14, "at least one element"),
        (14, "", 15, "within belongs to hosts"),
        (15, "", 12, "within: this key is missing: hosts needs"),
        (15, "within = [\"10.20.0.0/33\"]", 15, "a network is wanted, such as"),
        // To some readers these are octal, and so other networks.
        (15, "within = [\"010.20.0.0/16\"]", 15, "a network is wanted, such as"),
        (15, "within = [\"10.20.0.0/016\"]", 15, "a network is wanted, such as"),
        (15, "within = [\"::ffff:010.20.0.0/112\"]", 15, "a network is wanted, such as"),
        (15, "within = [\"10.20.0.0\"]", 15, "write 10.20.0.0/32 for this one address"),
        (15, "within = [\"10.20.0.1/16\"]", 15, "10.20.0.1/16 has bits beyond its prefix"),
        (15, "within = [\"10.0.0.0/8\"]\naddresses = [\"10.0.0.0/8\"]", 16, "hosts and addresses in one rule"),
        (16, "ports = []", 16, "at least one element"),
        (16, "ports = [0]", 16, "from 1 to 65535"),
        (16, "ports = [-1]", 16, "or a range as a string"),
        (16, "ports = [5432, \"6010-6000\"]", 16, "ports[1]: the range ends before it begins"),
        (16, "ports = [\"0-10\"]", 16, "port 0 cannot be connected to"),
        (16, "ports = [\"\"]", 16, "this is empty"),
        (16, "ports = [\"6000 - 6010\"]", 16, "ports are written as"),
        (16, "ports = [\"+1\"]", 16, "ports are written as"),
        (16, "ports = [\"*\"]", 16, "ports are written as"),
        (16, "ports = [1.5]", 16, "a whole number is wanted"),
        (16, "ports = [5432]\nnot_before = 2027-01-01", 17, "allow[0].not_before: a date and time with an offset"),
        (16, "ports = [5432]\nexpires = 1", 17, "allow[0].expires: a date and time with an offset"),
        (
            16,
            "ports = [5432]\nnot_before = 2027-01-01T00:00:00Z\nexpires = 2027-01-01T00:00:00Z",
            18,
            "allow[0].expires: it would never hold",
        ),
        (
            11,
            "expires = 2027-01-01T00:00:00Z\nnot_before = 2028-01-01T00:00:00Z",
            11,
            "orchestrator[0].expires: it would never hold",
        ),
        (11, "expire = 2027-01-01T00:00:00Z", 11, "did you mean expires?"),
        (16, "ports = [65536]", 16, "from 1 to 65535"),
        (16, "ports = \"5432\"", 16, "a list is wanted"),
        (16, "", 12, "ports: this key is missing"),
        (11, "asserts = [\"SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8\"]", 11, "a key without asserts is"),
        (17, "principals = []", 17, "at least one element"),
        (17, "principal = [\"provisioner\"]", 17, "did you mean principals?"),
        (19, "name = \"orders-db\"", 19, "rule orders-db is there already, at line 13"),
        (20, "addresses = [\"10.30.4.7/32\"]\nwithin = [\"10.0.0.0/8\"]", 21, "within belongs to hosts"),
        (20, "", 18, "this rule names nothing"),
        (21, &second("acme", &other), 23, "organisation acme is there already, at line 7"),
        (
            21,
            &second("globex", &key(&place.orchestrator)),
            26,
            "this key is an orchestrator key of acme too (at line 10)",
        ),
        (21, &format!("ports = [1]\n[[organisation.orchestrator]]\n{}", key(&place.orchestrator)), 23, "of acme too"),
        (
            21,
            &format!("ports = [1]\n{}", again.replace("orders-db", "again")),
            23,
            "rule \"again\" says the same as rule \"orders-db\"",
        ),
        (21, &deny("hosts = [\"db\"]"), 22, "deny[0].ports: this key is missing"),
        (21, &deny("ports = [1]"), 22, "deny[0].hosts: this rule denies nothing"),
        (21, &deny("ports = [1]\naddresses = [\"10.0.0.1/8\"]"), 25, "10.0.0.1/8 has bits beyond its prefix"),
        (21, &deny("ports = [1]\naddresses = [\"010.0.0.0/8\"]"), 25, "a network is wanted, such as"),
        (21, &deny("ports = [1]\nhosts = [\"*\"]"), 25, "deny[0].hosts[0]: the last label"),
        (21, &deny("ports = [1]\nhosts = []"), 25, "at least one element"),
        (21, &deny("ports = [1]\nhosts = [\"db\"]\nwithin = [\"10.0.0.0/8\"]"), 26, "deny[0].within: unknown key"),
        (21, &deny("ports = [1]\nhosts = [\"db\"]\nprincipals = []"), 26, "at least one element"),
        (21, &deny("ports = [1]\nhosts = [\"db\"]").replace("no-x", "legacy"), 23, "rule legacy is there already"),
        (21, &deny("ports = [1]\nhosts = [\"db\"]").replace("no-x", "a b"), 23, "a rule's name is"),
        (21, "ports = [1]\n[log]\nformat = \"xml\"", 23, "log.format: one of \"text\", \"json\" is wanted"),
        (21, "ports = [1]\n[local]\nx = 1", 22, "local: unknown key"),
        (8, "", 6, "gateways: this key is missing"),
        (21, "ports = [1]\n[listen]\naccept_from = [\"10.0.0.0/8\"]", 22, "listen.address: this key is missing"),
        (21, "ports = [1]\n[listen]\naddress = \"[::]:22\"", 22, "listen.accept_from: this key is missing"),
        (21, "ports = [1]\n[listen]\naddress = \"[::]:22\"\naccept_from = []", 24, "at least one element"),
        (
            21,
            "ports = [1]\n[listen]\naddress = \"bastion:22\"\naccept_from = [\"10.0.0.0/8\"]",
            23,
            "an address with a port is wanted",
        ),
        (
            21,
            "ports = [1]\n[listen]\naddress = \"[::]:22\"\naccept_from = [\"10.0.0.1/8\"]",
            24,
            "has bits beyond its prefix",
        ),
        (
            21,
            "ports = [1]\n[listen]\naddress = \"[::]:22\"\naccept_from = [\"10.0.0.0/8\"]\nallow = 1",
            25,
            "listen.allow: unknown key",
        ),
    ] {
        place.refuses(&good, line, lines, at, problem);
    }
}

#[test]
fn an_agent_that_listens_needs_no_gateway_and_still_a_key() {
    let place = Place::new();
    let listens = format!("{}\n[listen]\naddress = \"[::]:22\"\naccept_from = [\"10.0.0.0/8\"]", place.agent());
    let without = |words: &[&str]| -> String {
        listens.lines().filter(|line| !words.iter().any(|word| line.starts_with(word))).collect::<Vec<_>>().join("\n")
    };
    match place.load(&without(&["gateways"]), &[]) {
        Ok(Loaded::Agent(config, _)) => {
            assert!(config.organisations[0].gateways.is_empty());
            let listen = config.listen.expect("a listener");
            assert_eq!(listen.address.to_string(), "[::]:22");
            assert!(listen.accept_from.contain("10.1.2.3".parse().expect("an address")));
            assert!(!listen.accept_from.contain("11.1.2.3".parse().expect("an address")));
        }
        other => panic!("{other:?}"),
    }
    let faults = place.load(&without(&["gateways", "[[organisation.orchestrator]]", "key", "asserts"]), &[]);
    let faults = faults.expect_err("without a key").to_string();
    assert!(faults.contains("without a key nobody may log in"), "{faults}");
    let faults = place.load(&listens, &[("CAPONIER_LISTEN__ADDRESS", "22")]).expect_err("a port").to_string();
    assert!(faults.contains("CAPONIER_LISTEN__ADDRESS"), "{faults}");
}

#[test]
fn faults_of_a_gateway_are_found_where_they_are() {
    let place = Place::new();
    let good = place.gateway();
    for (line, lines, at, problem) in [
        (2, "listen = []", 2, "at least one element"),
        (2, "listen = [\"443\"]", 2, "an address with a port is wanted"),
        (2, "listen = [\"localhost:443\"]", 2, "an address with a port is wanted"),
        (2, "listen = [\"[::]:443\",\n\"[::]:443\"]", 3, "is there already, at line 2"),
        (2, "", 1, "gateway.listen: this key is missing, and there is no [[listener]]"),
        (17, "principal = \"a\"\n[[listener]]\nuser_ca = true", 18, "listener[0].address: this key is missing"),
        (17, "principal = \"a\"\n[[listener]]\naddress = \"0.0.0.0:443\"", 19, "is there already, at line 2"),
        (17, "principal = \"a\"\n[[listener]]\naddress = \"127.0.0.1:15432\"", 14, "is there already, at line 19"),
        (17, "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\naccept_from = []", 20, "at least one element"),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\naccept_from = [\"10.0.0.1/8\"]",
            20,
            "write 10.0.0.0/8",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nproxy_protocol_from = []",
            20,
            "at least one element",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nproxy_protocol_from = [\"10.0.0.1\"]",
            20,
            "10.0.0.1/32",
        ),
        (17, "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nuser_ca = \"yes\"", 20, "true or false"),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\ntls_terminated_by = [\"10.20.0.0/23\"]",
            20,
            "10.20.0.0/23 is more than 256 addresses: HTTP in clear, tokens and all, is taken from a balancer",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\ntls_terminated_by = [\"::/0\"]",
            20,
            "is more than 256 addresses",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nproxy_protocol_from = [\"10.20.0.0/24\"]\n\
             tls_terminated_by = [\"10.20.0.7/32\"]",
            21,
            "tls_terminated_by: an address is in proxy_protocol_from too",
        ),
        (17, "principal = \"a\"\n[[certificate]]\nkey = \"host\"", 18, "certificate[0].chain: this key is missing"),
        (17, "principal = \"a\"\n[[certificate]]\nchain = \"garbage\"\nkey = \"host\"", 19, "holds no PEM certificate"),
        (17, "principal = \"a\"\n[[certificate]]\nchain = \"absent\"\nkey = \"host\"", 19, "cannot be read"),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nclient_auth = \"strict\"",
            20,
            "without a [[certificate]] of the gateway's own there is none",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\naccept = []",
            20,
            "listener[0].accept: unknown key",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nclient_auth = \"on\"",
            20,
            "one of \"off\", \"loose\", \"strict\" is wanted",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nclient_ca = [\"absent\"]",
            20,
            "absent: cannot be read",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nclient_ca = [\"host\"]",
            20,
            "holds a private key",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nclient_ca = [\"garbage\"]",
            20,
            "holds no PEM certificate",
        ),
        (
            17,
            "principal = \"a\"\n[[listener]]\naddress = \"[::]:443\"\nclient_crl = [\"garbage\"]",
            20,
            "holds no PEM revocation list",
        ),
        (4, "registry = \"registry\"\nadmin_socket = \"127.0.0.1:9000\"", 5, "is a Unix socket and never a port"),
        (4, "registry = \"registry\"\nadmin_socket = \"tcp://host\"", 5, "is a Unix socket and never a port"),
        (3, "host_key = \"garbage\"", 3, "gateway.host_key: key file"),
        (3, "", 1, "gateway.host_key: this key is missing"),
        (4, "registry = \"absent\"", 4, "no folder"),
        (4, "registry = \"host\"", 4, "no folder"),
        (4, "registry = \"registry\"\nadmin_socket = 1", 5, "a string is wanted"),
        (8, "id = \"Acme\"\n", 8, "organisation ids are"),
        (9, "login_key = \"absent\"", 9, "organisation[0].login_key: key file"),
        (9, "login_key = \"host\"", 9, "this key is the gateway's host key too (at line 3)"),
        (11, "id = \"acme\"", 11, "organisation acme is there already, at line 8"),
        (12, "login_key = \"login-acme\"", 12, "this key is the login key of acme too (at line 9)"),
        (14, "listen = \"0.0.0.0:1\"", 14, "local[0].listen: a plain listener is accepted on loopback only"),
        (14, "listen = \"[::ffff:10.0.0.1]:1\"", 14, "on loopback only"),
        (15, "agent = \"prod-eu\"", 15, "ORG/AGENT"),
        (15, "agent = \"initech/prod-eu\"", 15, "no [[organisation]] here has the id initech"),
        (16, "target = \"orders.db.internal\"", 16, "the port is not a number"),
        (17, "principal = \"*\"", 17, "principal ids are"),
        (
            17,
            "principal = \"a\"\n[[local]]\nlisten = \"127.0.0.1:15432\"\nagent = \"acme/a\"\ntarget = \"a:1\"\nprincipal = \"a\"",
            19,
            "address 127.0.0.1:15432 is there already, at line 14",
        ),
    ] {
        place.refuses(&good, line, lines, at, problem);
    }
}

#[test]
fn faults_of_limits_are_found_where_they_are_and_say_why() {
    let place = Place::new();
    let (agent, gateway) = (place.agent(), place.gateway());
    for (key, value, problem) in [
        ("forwards", "0", "from 1 to 32768 is wanted: 0 would refuse everything, and each live forward holds a place"),
        ("forwards", "32769", "from 1 to 32768"),
        ("forwards", "\"many\"", "a whole number is wanted"),
        ("forwards_per_organisation", "0", "from 1 to 32768"),
        ("forwards_per_link", "0", "from 1 to 4096"),
        ("forwards_per_link", "4097", "from 1 to 4096 is wanted: 0 would refuse everything, and the memory of a link"),
        ("pending_opens_per_link", "0", "from 1 to 256"),
        ("pending_opens_per_link", "257", "and a gateway asks for no more at once"),
        ("opens_per_second_per_organisation", "0", "from 1 to 100000"),
        ("opens_per_second_per_organisation", "100001", "and no trail takes the records of more"),
        ("idle_s", "-1", "from 0 to 31536000 is wanted: seconds, up to a year; 0 is no limit"),
        ("life_s", "31536001", "up to a year"),
        ("life_s", "1.5", "a whole number is wanted"),
        ("forwards_per_principal", "1", "unknown key: accepted here are"),
    ] {
        let lines = format!("host_key = \"host\"\n[agent.limits]\n{key} = {value}");
        place.refuses(&agent, 3, &lines, 5, &format!("agent.limits.{key}: "));
        place.refuses(&agent, 3, &lines, 5, problem);
    }
    for (key, value, problem) in [
        ("forwards_per_link", "0", "from 1 to 4096"),
        ("forwards_per_link", "4097", "from 1 to 4096"),
        ("forwards_per_principal", "0", "from 1 to 32768 is wanted: 0 would refuse everything"),
        ("forwards_per_organisation", "40000", "from 1 to 32768"),
        ("sessions_per_principal", "0", "from 1 to 1024"),
        ("sessions_per_principal", "1025", "and each session may hold memory of the gateway"),
        ("pending_opens_per_principal", "0", "from 1 to 32768"),
        ("opens_per_second_per_principal", "0", "from 1 to 100000"),
        ("opens_per_second_per_organisation", "-5", "from 1 to 100000"),
        ("idle_s", "true", "a whole number is wanted"),
        ("life_s", "-1", "0 is no limit"),
        ("pending_opens_per_link", "1", "unknown key: "),
    ] {
        let lines = format!("registry = \"registry\"\n[gateway.limits]\n{key} = {value}");
        place.refuses(&gateway, 4, &lines, 6, &format!("gateway.limits.{key}: "));
        place.refuses(&gateway, 4, &lines, 6, problem);
    }
    place.refuses(&gateway, 4, "registry = \"registry\"\nlimits = 5", 5, "gateway.limits: a table is wanted");
}

#[test]
fn faults_of_the_resolver_are_found_where_they_are() {
    let place = Place::new();
    let agent = place.agent();
    let nine: Vec<_> = (1..10).map(|last| format!("\"10.0.0.{last}:53\"")).collect();
    for (key, value, problem) in [
        ("servers", "[]".to_owned(), "at least one element is wanted"),
        ("servers", "[\"10.0.0.2\"]".to_owned(), "an address with a port is wanted"),
        ("servers", "[\"dns.internal:53\"]".to_owned(), "an address with a port is wanted"),
        ("servers", "[\"10.0.0.2:0\"]".to_owned(), "the address and port of one DNS server"),
        ("servers", "[\"0.0.0.0:53\"]".to_owned(), "the address and port of one DNS server"),
        ("servers", "[\"[ff02::fb]:5353\"]".to_owned(), "the address and port of one DNS server"),
        ("servers", "[\"10.0.0.2:53\", \"10.0.0.2:53\"]".to_owned(), "10.0.0.2:53 is listed already"),
        ("servers", format!("[{}]", nine.join(", ")), "at most 8 servers"),
        ("timeout_s", "0".to_owned(), "from 1 to 10 is wanted"),
        ("timeout_s", "11".to_owned(), "a forward needs the rest of its time"),
        ("family", "\"ipv5\"".to_owned(), "one of \"any\", \"prefer-ipv4\", \"prefer-ipv6\", \"ipv4\", \"ipv6\""),
        ("cache_ttl_max_s", "60".to_owned(), "is never cached here: name servers too"),
        ("cache_ttl_max_s", "86401\nservers = [\"10.0.0.2:53\"]".to_owned(), "from 0 to 86400 is wanted"),
        ("search", "[\"example.com\"]".to_owned(), "unknown key: accepted here are"),
    ] {
        let lines = format!("host_key = \"host\"\n[agent.resolver]\n{key} = {value}");
        place.refuses(&agent, 3, &lines, 5, &format!("agent.resolver.{key}"));
        place.refuses(&agent, 3, &lines, 5, problem);
    }
}

#[test]
fn services_need_servers_to_be_asked_for() {
    let place = Place::new();
    let service = "services = [\"_postgresql._tcp.db.internal\"]";
    let problem = "organisation[0].allow[0].services: services are asked for at DNS servers of your choosing";
    place.refuses(&place.agent(), 14, service, 14, problem);
}

#[test]
fn the_resolver_is_the_systems_unless_servers_are_named() {
    let place = Place::new();
    assert_eq!(place.load_agent(&[]).resolver, resolve::Config::default());
    let resolver = place
        .load_agent(&[
            ("CAPONIER_AGENT__RESOLVER__FAMILY", "prefer-ipv4"),
            ("CAPONIER_AGENT__RESOLVER__TIMEOUT_S", "2"),
            ("CAPONIER_AGENT__RESOLVER__SERVERS__0", "10.0.0.2:53"),
            ("CAPONIER_AGENT__RESOLVER__CACHE_TTL_MAX_S", "0"),
        ])
        .resolver;
    let wanted = resolve::Config {
        servers: vec!["10.0.0.2:53".parse().expect("an address")],
        timeout: std::time::Duration::from_secs(2),
        life: std::time::Duration::ZERO,
        family: resolve::Family::PreferIpv4,
    };
    assert_eq!(resolver, wanted);
}

#[test]
fn limits_are_set_one_by_one_by_the_file_and_the_environment() {
    let place = Place::new();
    let defaults = agent::Limits::default();
    assert_eq!(place.load_agent(&[]).limits, defaults);
    let config =
        place.load_agent(&[("CAPONIER_AGENT__LIMITS__FORWARDS", "7"), ("CAPONIER_AGENT__LIMITS__IDLE_S", "90")]).limits;
    let idle = Some(std::time::Duration::from_secs(90));
    let forward = crate::tunnel::splice::Bounds { idle, life: None };
    assert_eq!(config, agent::Limits { forwards: 7, forward, ..defaults });

    let defaults = gateway::Limits::default();
    let text = place.gateway().replace("[audit]", "[gateway.limits]\nidle_s = 0\nforwards_per_link = 9\n[audit]");
    let load = |variables: &[(&str, &str)]| match place.load(&text, variables) {
        Ok(Loaded::Gateway(config, _)) => config.limits,
        other => panic!("{other:?}"),
    };
    assert_eq!(load(&[]), gateway::Limits { forwards_per_link: 9, ..defaults });
    let limits = load(&[
        ("CAPONIER_GATEWAY__LIMITS__FORWARDS_PER_PRINCIPAL", "8"),
        ("CAPONIER_GATEWAY__LIMITS__FORWARDS_PER_LINK", "10"),
    ]);
    assert_eq!(limits, gateway::Limits { forwards_per_link: 10, forwards_per_principal: 8, ..defaults });
    let of_nought = [("CAPONIER_GATEWAY__LIMITS__FORWARDS_PER_PRINCIPAL", "0")];
    let faults = place.load(&text, &of_nought).expect_err("nobody could do anything").to_string();
    assert!(faults.contains("(set by CAPONIER_GATEWAY__LIMITS__FORWARDS_PER_PRINCIPAL): a whole"), "{faults}");
}

#[test]
fn faults_of_resources_are_found_where_they_are() {
    let place = Place::new();
    let good = place.resources();
    for (line, lines, at, problem) in [
        (2, "gateway = \"https://g\"", 2, "provision.gateway: a gateway is written ssh://"),
        (2, "gateway = \"ws://g\"", 2, "provision.gateway: ws:// is clear text"),
        (3, "agent = \"prod\"", 3, "provision.agent: ORG/AGENT"),
        (2, "", 1, "provision.gateway: this key is missing"),
        (3, "", 1, "provision.agent: this key is missing"),
        (2, "ssh_host = \"bastion\"\ngateway = \"ssh://g\"", 2, "choose one of the two ways"),
        (2, "ssh_user = \"acme\"", 2, "choose one of the two ways"),
        (2, "gateway = \"ssh://g\"\nprincipal = \"ci\"", 3, "choose one of the two ways"),
        (4, "identity = \"exposed\"", 4, "chmod 600"),
        (5, "", 1, "provision.known_hosts: this key is missing"),
        (5, "host_key_fingerprint = \"MD5:aa\"", 5, "host_key_fingerprint"),
        (5, "known_hosts = \"garbage\"", 5, "known_hosts"),
        (6, "", 1, "provision.output: this key is missing"),
        (6, "output = \"-\"\nid = \"A b\"", 7, "provision.id: the id of a set of resources is"),
        (8, "host = \"0x7f.1\"", 8, "instance.host: the host looks like an address"),
        (9, "user = \"\"", 9, "instance.user: this is empty"),
        (9, "user = \"p\"\npassword = \"hunter2\"", 10, "instance.password: a password does not belong"),
        (8, "host = \"10.0.0.1\"\nappend_host_to_user = true", 9, "the host is an address"),
        (9, "user = \"p@orders\"\nappend_host_to_user = true", 10, "give it without"),
        (9, "user = \"p\"\nappend_host_to_user = 1", 10, "instance.append_host_to_user"),
        (10, "password_file = \"credentials-of-all\"", 10, "can be read by others (mode 0644)"),
        (10, "password_file = \"credentials-of-two\"", 10, "must hold one line"),
        (10, "password_file = \"absent\"", 10, "cannot be read"),
        (10, "tls = \"prefer\"", 10, "instance.tls: one of \"verify-full\", \"disable\" is wanted"),
        (10, "tls = \"disable\"\ntls_name = \"db\"", 11, "no use with tls"),
        (10, "tls_name = \"a b\"", 10, "a DNS name or an address is wanted"),
        (10, "ca_file = \"garbage\"", 10, "holds no PEM certificate"),
        (12, "name = \"postgres\"", 12, "database[0].name: the name is reserved"),
        (12, "name = \"dbname=x\"", 12, "would take the name for"),
        (12, "name = \"a\\u0000b\"", 12, "control character"),
        (12, "name = \"orders\"\nowner = \"pg_x\"", 13, "database[0].owner: the name is reserved"),
        (12, "name = \"orders\"\nowner = \"provisioner\"", 13, "it is also the administrator"),
        (12, "name = \"orders\"\nuser = \"x\"", 13, "database[0].user: unknown key"),
        (12, "name = \"orders\"\nencoding = \"UTF8'\"", 13, "an encoding of PostgreSQL is wanted"),
        (12, "name = \"orders\"\nconnection_limit = -2", 13, "a whole number from -1"),
        (14, "name = \"pgcrypto\"\n[[database.extension]]\nname = \"pgcrypto\"", 16, "the extension is named twice"),
        (15, "version = \"1\\n2\"", 15, "a version is at most"),
        (18, "privileges = [\"select\"]", 18, "privileges[0]: a privilege is one of"),
        (18, "privileges = [\"usage\"]", 18, "database[0].grant[0].privileges: a database has no privilege USAGE"),
        (18, "privileges = [\"connect\"]\nschema = \"app\"", 18, "a schema has no privilege CONNECT"),
        (20, "name = \"orders\"", 20, "role[0].name: it is also the owner of a database"),
        (20, "name = \"reader\"\nmember_of = [\"reader\"]", 21, "cannot be a member of itself"),
        (20, "name = \"reader\"\n[[role]]\nname = \"reader\"", 22, "there are two roles"),
    ] {
        place.refuses(&good, line, lines, at, problem);
    }
}

#[test]
fn an_instance_is_reached_by_one_way() {
    let place = Place::new();
    let bastion = place.resources().replace(
        "gateway = \"ssh://gateway.example.com\"\nagent = \"acme/prod-eu\"",
        "ssh_host = \"bastion.example.com\"\nssh_user = \"acme\"\nid = \"orders\"",
    );
    match place.load(&bastion, &[]) {
        Ok(Loaded::Resources(config)) => {
            assert_eq!(config.client.server.to_string(), "SSH server bastion.example.com:22");
            assert_eq!(config.client.server.user(), "acme");
            assert_eq!(config.resources.instance.login_suffix, None);
        }
        other => panic!("{other:?}"),
    }
    for (line, lines, at, problem) in [
        (2, "ssh_host = \"0x7f.1\"", 2, "provision.ssh_host: the host looks like an address"),
        (2, "ssh_host = \"bastion\"\nssh_port = 0", 3, "provision.ssh_port: a whole number from 1"),
        (2, "", 1, "provision.ssh_host: this key is missing"),
        (2, "ssh_host = \"bastion\"\nagent = \"acme/prod\"", 2, "choose one of the two ways"),
        (3, "", 1, "provision.ssh_user: this key is missing"),
        (3, "ssh_user = \"a b\"", 3, "provision.ssh_user: a user is"),
        (3, "ssh_user = \"acme\"\nprincipal = \"A\"", 4, "provision.principal"),
        (4, "", 1, "provision.id: this key is missing"),
        (6, "", 1, "provision.known_hosts: this key is missing"),
        (6, "known_hosts = \"garbage\"", 6, "known_hosts"),
    ] {
        place.refuses(&bastion, line, lines, at, problem);
    }
    let azure = place.resources().replace("port = 5432", "append_host_to_user = true");
    match place.load(&azure, &[]) {
        Ok(Loaded::Resources(config)) => {
            let instance = &config.resources.instance;
            assert_eq!(
                (instance.user.as_str(), instance.login(&instance.user).as_str()),
                ("provisioner", "provisioner@orders")
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_administrators_password_comes_from_the_environment_or_a_file() {
    let place = Place::new();
    let load = |text: &str, variables: &[(&str, &str)]| match place.load(text, variables) {
        Ok(Loaded::Resources(config)) => {
            assert!(!format!("{config:?}").contains("hunter2"));
            config.resources.instance.password.as_ref().map(|password| password.expose().clone())
        }
        other => panic!("{other:?}"),
    };
    let good = place.resources();
    assert_eq!(load(&good, &[]), None);
    place.write("password", "hunter2\n", 0o600);
    let file = good.replace("user = \"provisioner\"", "user = \"provisioner\"\npassword_file = \"password\"");
    assert_eq!(load(&file, &[]).as_deref(), Some("hunter2"));
    for variable in ["CAPONIER_DATABASE_PASSWORD", "CAPONIER_INSTANCE__PASSWORD"] {
        assert_eq!(load(&good, &[(variable, "hunter2 ")]).as_deref(), Some("hunter2 "));
        assert_eq!(load(&file, &[(variable, "other")]).as_deref(), Some("other"));
    }
    // The variable says nothing to a gateway or an agent.
    assert!(place.load(&place.agent(), &[("CAPONIER_DATABASE_PASSWORD", "hunter2")]).is_ok());
}

#[test]
fn whole_parts_that_are_missing_are_said() {
    let place = Place::new();
    for (text, problems) in [
        ("", &["none of [agent], [gateway], [proxy] and [provision]"][..]),
        ("[agent]\n[gateway]", &["[agent] and [gateway] in one file"]),
        ("[agent]\n[provision]", &["[agent] and [provision] in one file"]),
        ("[provision]", &["provision.gateway: this", "provision.known_hosts: this", "instance: this"]),
        (
            "[agent]",
            &[
                "agent.id: this",
                "agent.host_key: this",
                "organisation: no [[organisation]]",
                "audit: this key is missing",
            ],
        ),
        (
            "[gateway]\n[[organisation]]",
            &[
                "gateway.listen: this",
                "gateway.registry: this",
                "organisation[0].id",
                "organisation[0].login_key",
                "audit: ",
            ],
        ),
        ("[gateway]\norganisation = []", &["gateway.organisation: unknown key"]),
        ("organisation = []\n[gateway]", &["config.toml:1: organisation: no [[organisation]]"]),
        ("[gateway]\n[organisation]\nid = \"a\"", &["write [[organisation]]"]),
        ("[agent]\n[[organisation]]\nid = \"a\"", &["organisation[0].orchestrator: no [[organisation.orchestrator]]"]),
        ("[agent\nid = ", &["config.toml:1: not TOML"]),
        ("[agent]\nid = \nx = 1x\n", &["config.toml:2: not TOML", "config.toml:3: not TOML"]),
    ] {
        let faults = place.load(text, &[]).expect_err(text).to_string();
        for problem in problems {
            assert!(faults.contains(problem), "{text}: {faults}");
        }
    }
    assert!(load_with(&place.dir.path().join("absent.toml"), []).is_err());
}

#[test]
fn an_agent_that_is_in_order() {
    let place = Place::new();
    let config = place.load_agent(&[]);
    assert_eq!(config.id.as_str(), "prod-eu");
    assert!(config.egress.proxy().is_none());
    let kind = SinkKind::File {
        path: place.dir.path().join("trail.jsonl"),
        fsync: Fsync::Interval(crate::limits::TRAIL_FSYNC),
        rotate: Rotation {
            bytes: Some(crate::limits::TRAIL_ROTATE),
            age: Some(crate::limits::TRAIL_ROTATE_AGE),
            keep: None,
        },
    };
    assert_eq!(config.audit, Sinks::new(vec![SinkConfig::required("file", kind)]));
    let [organisation] = &config.organisations[..] else { panic!("one organisation") };
    assert_eq!(organisation.gateways[0].to_string(), "ssh://gateway.example.com:443");
    assert_eq!(organisation.orchestrators[0].asserts.as_ref().map(Vec::len), Some(2));
    let names: Vec<_> = organisation.allow.rules().iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["orders-db", "legacy"]);
}

#[test]
fn odd_spellings_are_refused_in_rules_as_in_requests() {
    let place = Place::new();
    let over = "a.".repeat(128);
    for text in [
        "0177.0.0.1",
        "2130706433",
        "0x7f.1",
        "127.0.0.1",
        "127.0.0.1.",
        "::1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "fe80::1%eth0",
        "[::1]",
        "db..internal",
        "db.internal..",
        "bücher.example",
        "１２７.0.0.1",
        "db\u{3002}internal",
        "db\\u0000.internal",
        "db%2einternal",
        " db.internal",
        over.as_str(),
    ] {
        for rule in ["hosts = [\"orders.db.internal\"]", "[[organisation.deny]]"] {
            let deny = format!("[[organisation.deny]]\nname = \"no\"\nports = [1]\nhosts = [\"{text}\"]");
            let agent = match rule {
                "[[organisation.deny]]" => format!("{}\n{deny}", place.agent()),
                hosts => place.agent().replace(hosts, &format!("hosts = [\"{text}\"]")),
            };
            let faults = place.load(&agent, &[]).expect_err(text).to_string();
            assert!(faults.lines().count() == 1 && faults.contains("hosts[0]: "), "{text}: {faults}");
        }
        let gateway = place.gateway().replace("orders.db.internal:5432", &format!("{text}:5432"));
        let literal = ["127.0.0.1"].contains(&text);
        assert_eq!(place.load(&gateway, &[]).is_ok(), literal || text == "[::1]", "{text}");
        let network = place.agent().replace("10.30.4.7/32", &format!("{text}/32"));
        assert_eq!(place.load(&network, &[]).is_ok(), literal, "{text}");
    }
}

#[test]
fn rules_of_an_agent_are_read_in_every_form() {
    let place = Place::new();
    let more = [
        "not_before = 2027-01-01T00:00:00Z",
        "expires = \"2027-01-02T01:00:00+01:00\"",
        "[[organisation.allow]]",
        "name = \"patterns\"",
        "hosts = [\"*.EU.db.internal.\", \"**.shard.internal\"]",
        "within = [\"10.21.0.0/16\"]",
        "ports = [5432, \"6000-6010\", \"7000\"]",
        "[[organisation.allow]]",
        "name = \"service\"",
        "services = [\"_postgresql._tcp.db.internal\"]",
        "within = [\"10.22.0.0/16\"]",
        "ports = [\"5432-5440\"]",
        "[[organisation.deny]]",
        "name = \"no-metadata\"",
        "hosts = [\"_ldap._tcp.db.internal\", \"**.secret.internal\"]",
        "addresses = [\"10.20.9.0/24\", \"::ffff:10.20.8.0/120\"]",
        "ports = [\"1-65535\"]",
        "principals = [\"ci-*\"]",
        "expires = 2030-01-01T00:00:00Z",
    ];
    let servers = [("CAPONIER_AGENT__RESOLVER__SERVERS__0", "10.0.0.2:53")];
    let config = match place.load(&format!("{}\n{}", place.agent(), more.join("\n")), &servers) {
        Ok(Loaded::Agent(config, _)) => config,
        other => panic!("{other:?}"),
    };
    let allow = &config.organisations[0].allow;
    let [_, legacy, patterns, service] = allow.rules() else { panic!("four rules") };
    assert_eq!(legacy.window.to_string(), "from 2027-01-01T00:00:00Z until 2027-01-02T00:00:00Z");
    let ports: Vec<_> = patterns.ports.iter().map(ToString::to_string).collect();
    assert_eq!(ports, ["5432", "6000-6010", "7000"]);
    let written = format!("{patterns:?} {service:?}");
    for part in ["*.eu.db.internal", "**.shard.internal", "_postgresql._tcp.db.internal"] {
        assert!(written.contains(part), "{written}");
    }
    let [deny] = allow.denies() else { panic!("one deny rule") };
    let addresses: Vec<_> = deny.addresses.iter().map(ToString::to_string).collect();
    assert_eq!((deny.hosts.len(), addresses), (2, vec!["10.20.9.0/24".to_owned(), "10.20.8.0/24".to_owned()]));
}

#[test]
fn a_gateway_that_is_in_order() {
    let place = Place::new();
    let text = format!("{}\n[log]\nformat = \"json\"", place.gateway());
    let Ok(Loaded::Gateway(config, log)) = place.load(&text, &[]) else { panic!("in order") };
    assert_eq!(log.format, LogFormat::Json);
    assert_eq!(config.listen, [gateway::Listener::plain("0.0.0.0:443".parse().expect("an address"))]);
    assert_eq!(config.registry, place.dir.path().join("registry"));
    assert_eq!(config.organisations.len(), 2);
    assert_eq!(config.local[0].target.to_string(), "orders.db.internal:5432");
    assert_eq!(config.audit, Sinks::stdout());
    assert!(config.admin_socket.is_none());
}

#[test]
fn listeners_of_which_more_is_said_stand_beside_plain_ones_or_alone() {
    let place = Place::new();
    let more = "\n[[listener]]\naddress = \"[::]:443\"\naccept_from = [\"10.0.0.0/8\"]\nproxy_protocol_from = \
                [\"::ffff:192.0.2.7/128\"]\nuser_ca = true";
    let beside = format!("{}{more}", place.gateway());
    let alone = beside.replace("listen = [\"0.0.0.0:443\"]\n", "");
    for (text, addresses) in [(beside, &["0.0.0.0:443", "[::]:443"][..]), (alone, &["[::]:443"])] {
        let Ok(Loaded::Gateway(config, _)) = place.load(&text, &[]) else { panic!("in order: {text}") };
        let listening: Vec<_> = config.listen.iter().map(|listener| listener.address.to_string()).collect();
        assert_eq!(listening, addresses);
        let last = config.listen.last().expect("a listener");
        assert!(last.certificates);
        let holds = |networks: &Option<crate::network::Networks>, address: &str| {
            networks.as_ref().is_some_and(|networks| networks.contain(address.parse().expect("an address")))
        };
        assert!(holds(&last.accept_from, "10.1.1.1") && !holds(&last.accept_from, "192.0.2.7"));
        assert!(holds(&last.balancers, "192.0.2.7") && !holds(&last.balancers, "10.1.1.1"));
    }
}

#[test]
fn the_later_source_of_the_proxy_takes_precedence() {
    let place = Place::new();
    let in_file = place.agent().replace("[audit]", "proxy = \"http://file:1\"\n[audit]");
    let of = |variables: &[(&str, &str)], text: &str| match place.load(text, variables) {
        Ok(Loaded::Agent(config, _)) => config.egress.proxy().map(|proxy| proxy.endpoint.to_string()),
        other => panic!("{other:?}"),
    };
    let usual = ("AGENT_PROXY", "http://usual:2");
    let own = ("CAPONIER_AGENT__PROXY", "http://own:3");
    assert_eq!(of(&[], &place.agent()), None);
    assert_eq!(of(&[("AGENT_PROXY", "")], &place.agent()), None);
    assert_eq!(of(&[], &in_file).as_deref(), Some("file:1"));
    assert_eq!(of(&[("AGENT_PROXY", "")], &in_file).as_deref(), Some("file:1"));
    assert_eq!(of(&[usual], &in_file).as_deref(), Some("usual:2"));
    assert_eq!(of(&[usual, own], &in_file).as_deref(), Some("own:3"));
    assert_eq!(of(&[own, usual], &place.agent()).as_deref(), Some("own:3"));

    // What is meant for all programs counts where nothing else says anything.
    let (all, small) = (("HTTPS_PROXY", "http://all:4"), ("https_proxy", "all:5"));
    assert_eq!(of(&[all], &place.agent()).as_deref(), Some("all:4"));
    assert_eq!(of(&[small, all], &place.agent()).as_deref(), Some("all:4"));
    assert_eq!(of(&[small, ("HTTPS_PROXY", "")], &place.agent()).as_deref(), Some("all:5"));
    assert_eq!(of(&[all, ("CAPONIER_AGENT__PROXY", "")], &place.agent()).as_deref(), Some("all:4"));
    assert_eq!(of(&[all, small], &in_file).as_deref(), Some("file:1"));
    assert_eq!(of(&[all, usual], &place.agent()).as_deref(), Some("usual:2"));
    assert_eq!(of(&[all, own], &place.agent()).as_deref(), Some("own:3"));

    // To have none is to say something.
    let none = place.agent().replace("[audit]", "proxy = \"none\"\n[audit]");
    assert_eq!(of(&[all], &none), None);
    assert_eq!(of(&[all, usual], &none).as_deref(), Some("usual:2"));
    assert_eq!(of(&[all, ("AGENT_PROXY", "none")], &in_file), None);
    assert_eq!(of(&[usual, ("CAPONIER_AGENT__PROXY", "none")], &in_file), None);
    let with_credentials = in_file.replace("[audit]", "proxy_credentials_file = \"credentials\"\n[audit]");
    assert_eq!(of(&[("AGENT_PROXY", "none")], &with_credentials), None);
    assert_eq!(of(&[usual], &with_credentials).as_deref(), Some("usual:2"));

    // The agent's variable is not for resources.
    for (variables, proxy) in [(&[usual][..], None), (&[usual, all], Some("all:4"))] {
        let Ok(Loaded::Resources(loaded)) = place.load(&place.resources(), variables) else { panic!("in order") };
        let found = loaded.client.egress.proxy().map(|proxy| proxy.endpoint.to_string());
        assert_eq!(found.as_deref(), proxy);
    }
}

#[test]
fn what_does_without_the_proxy_is_said_by_the_file_before_the_environment() {
    let place = Place::new();
    let proxied = |more: &str| place.agent().replace("[audit]", &format!("proxy = \"http://p:1\"\n{more}\n[audit]"));
    let direct = |text: &str, variables: &[(&str, &str)], target: &str| match place.load(text, variables) {
        Ok(Loaded::Agent(config, _)) => config.egress.proxy_to(&target.parse().expect(target)).is_none(),
        other => panic!("{other:?}"),
    };
    let all = ("NO_PROXY", "a.test, 10.0.0.0/8");
    assert!(!direct(&proxied(""), &[], "a.test:443"));
    assert!(direct(&proxied(""), &[all], "x.a.test:443"));
    assert!(direct(&proxied(""), &[("no_proxy", "b.test"), all], "10.1.1.1:443"));
    assert!(direct(&proxied(""), &[("no_proxy", "b.test"), ("NO_PROXY", "")], "b.test:443"));
    assert!(!direct(&proxied("no_proxy = [\"b.test\"]"), &[all], "a.test:443"));
    assert!(direct(&proxied("no_proxy = [\"b.test\", \"[2001:db8::]/32\"]"), &[all], "[2001:db8::1]:443"));
    assert!(!direct(&proxied("no_proxy = []"), &[all], "a.test:443"));
    assert!(direct(&proxied(""), &[all, ("CAPONIER_AGENT__NO_PROXY", "c.test")], "c.test:443"));
    assert!(direct(&proxied(""), &[all, ("CAPONIER_AGENT__NO_PROXY__0", "c.test")], "c.test:443"));
    // Where there is no proxy, what others mean by it does not matter.
    assert!(direct(&place.agent(), &[("NO_PROXY", "192.168.*")], "a.test:443"));
}

#[test]
fn faults_of_the_way_out_name_the_variable_and_never_its_value() {
    let place = Place::new();
    let told = |text: &str, variables: &[(&str, &str)]| {
        let faults = place.load(text, variables).expect_err("a fault").to_string();
        assert!(!faults.contains("hunter2") && !faults.contains("192.168"), "{faults}");
        faults
    };
    for (variable, value) in [
        ("HTTPS_PROXY", "ftp://u:hunter2@p:1"),
        ("https_proxy", "socks4://u:hunter2@p:1"),
        ("AGENT_PROXY", "hunter2:1"),
        ("HTTPS_PROXY", "u:hunter2@p"),
    ] {
        let faults = told(&place.agent(), &[(variable, value)]);
        assert!(faults.contains(&format!("agent.proxy (set by {variable}): ")), "{faults}");
    }
    let faults = told(&place.resources(), &[("HTTPS_PROXY", "ftp://u:hunter2@p:1")]);
    assert!(faults.contains("provision.proxy (set by HTTPS_PROXY): a proxy is written http://"), "{faults}");
    let all = [("HTTPS_PROXY", "p:1"), ("NO_PROXY", "a.test,192.168.*")];
    let faults = told(&place.agent(), &all);
    assert!(faults.contains("agent.no_proxy (set by NO_PROXY): entry 2 is none: a host"), "{faults}");
    // A gateway leaves its network for nobody.
    assert!(place.load(&place.gateway(), &[("HTTPS_PROXY", "ftp://u:hunter2@p:1")]).is_ok());
}

#[test]
fn credentials_of_the_proxy_are_read_and_hidden() {
    let place = Place::new();
    let config = place
        .load_agent(&[("AGENT_PROXY", "http://proxy:3128"), ("CAPONIER_AGENT__PROXY_CREDENTIALS_FILE", "credentials")]);
    assert!(config.egress.proxy().is_some_and(|proxy| proxy.credentials.is_some()));
    assert!(!format!("{config:?}").contains("hunter2"));
    let faults = place.load(&place.agent(), &[("AGENT_PROXY", "http://u:hunter2@proxy")]).expect_err("no port");
    assert!(faults.to_string().contains("agent.proxy (set by AGENT_PROXY): "), "{faults}");
    assert!(!faults.to_string().contains("hunter2"), "{faults}");
}

#[test]
fn the_environment_sets_what_the_file_does_not() {
    let place = Place::new();
    let config = place.load_agent(&[
        ("CAPONIER_AGENT__REPLICA", "Host-2"),
        ("CAPONIER_ORGANISATION__0__GATEWAYS__1", "ssh://other.example.com:8443"),
        ("CAPONIER_PORT", "tcp://10.0.0.1:443"),
        ("HOME", "/"),
    ]);
    assert_eq!(config.replica.as_str(), "Host-2");
    assert_eq!(config.organisations[0].gateways.len(), 2);
}

#[test]
fn a_gateway_may_have_several_ways_none_of_which_a_forward_may_take() {
    let place = Place::new();
    let several = "gateways = [\"ssh://a\", [\"tls://b\", \"wss://c:8443/x\"]]";
    let text = place.agent().replace("gateways = [\"ssh://gateway.example.com\"]", several);
    let Ok(Loaded::Agent(config, _)) = place.load(&text, &[]) else { panic!("a good configuration") };
    let gateways: Vec<_> = config.organisations[0].gateways.iter().map(ToString::to_string).collect();
    assert_eq!(gateways, ["ssh://a:443", "[tls://b:443, wss://c:8443/x]"]);
    let ways_out = config.ways_out();
    for way in ["a:443", "b:443", "c:8443"] {
        assert!(ways_out.contains(&way.parse().expect("a target")), "{way}");
    }
}

#[test]
fn variables_that_set_nothing_are_faults() {
    let place = Place::new();
    for (variable, problem) in [
        ("CAPONIER_AGENT__HOSTKEY", "agent.hostkey (set by CAPONIER_AGENT__HOSTKEY): unknown key"),
        ("CAPONIER_GATEWAY__LISTEN", "gateway (set by CAPONIER_GATEWAY__LISTEN): unknown key"),
        ("CAPONIER_AGENT_PROXY", "write CAPONIER_AGENT__PROXY"),
        ("CAPONIER_ORGANISATION__ID", "names a key where there is no table"),
        ("CAPONIER_ORGANISATION__7__ID", "the one before is missing"),
    ] {
        let faults = place.load(&place.agent(), &[(variable, "x")]).expect_err(variable);
        assert!(faults.to_string().contains(problem), "{faults}");
    }
    place.write("config.toml", &place.agent(), 0o600);
    let bytes = ("CAPONIER_AGENT__ID".into(), OsString::from_vec(vec![0xff]));
    let faults = load_with(&place.dir.path().join("config.toml"), [bytes]).expect_err("not UTF-8");
    assert!(faults.to_string().contains("CAPONIER_AGENT__ID"), "{faults}");
}
