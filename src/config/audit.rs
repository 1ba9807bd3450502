//! Reads `[audit]`: where the trail goes.

use std::path::PathBuf;
use std::time::Duration;

use super::collectors;
use super::file::{Once, optional, private_key};
use crate::audit::head::Signer;
use crate::audit::sink::{Content, Fsync, Rotation, SinkConfig, SinkKind, Sinks};
use crate::document::{Item, Table};
use crate::identity::{AgentId, PrivateKey};
use crate::limits::{TRAIL_ROTATE, TRAIL_ROTATE_AGE};

/// All of `[audit]`.
pub(super) fn audit(root: &Table<'_>) -> Option<Sinks> {
    let table = root.required_table("audit")?;
    let stdout = table.optional("stdout");
    let file = optional(table.optional("file"), |item| item.path());
    let further = sinks(&table);
    let signing_key = optional(table.optional("signing_key"), signing_key);
    let number = |key, range| optional(table.optional(key), |item: &Item<'_>| item.integer::<u64>(range));
    let head_records = number("head_records", 1..=1_000_000);
    let head_s = number("head_s", 1..=DAY);
    let progress_s = number("progress_s", 1..=DAY);
    let wanted = match &stdout {
        Some(item) => item.boolean()?,
        None => false,
    };
    let first = match (file?, wanted) {
        (Some(path), false) => {
            let kind = file_sink(&table, path)?;
            Some(Sinks::new(vec![SinkConfig::required("file", kind)]))
        }
        (None, true) => Some(Sinks::stdout()),
        (Some(_), true) => {
            table.fault("stdout", "a file and stdout: choose one");
            return None;
        }
        (None, false) => None,
    };
    let further = further?;
    if first.is_none() && !further.iter().any(|sink| sink.required) {
        let problem = match further.is_empty() {
            true => "nowhere to write to: give file = \"…\" or stdout = true",
            false => {
                "no sink is required, so that everything could be lost: give file = \"…\", or required = true to one"
            }
        };
        table.fault("file", problem);
        return None;
    }
    let mut sinks = first.unwrap_or_else(|| Sinks::new(Vec::new()));
    sinks.list.extend(further);
    sinks.signing_key = signing_key?;
    sinks.heads.records = head_records?.unwrap_or(sinks.heads.records);
    sinks.heads.every = head_s?.map_or(sinks.heads.every, Duration::from_secs);
    sinks.progress = progress_s?.map_or(sinks.progress, Duration::from_secs);
    Some(sinks)
}

/// The key that heads are signed with.
fn signing_key(item: &Item<'_>) -> Option<PrivateKey> {
    let key = private_key(item)?;
    match Signer::new(key.clone()) {
        Ok(_) => Some(key),
        Err(error) => item.reject(error.to_string()),
    }
}

/// The file at `path`, with what `table` says of it.
fn file_sink(table: &Table<'_>, path: PathBuf) -> Option<SinkKind> {
    let each = optional(table.optional("fsync"), |item| item.choice(&[("each", true), ("interval", false)]));
    let fsync_s = optional(table.optional("fsync_s"), |item| item.integer::<u64>(1..=3_600));
    let (each, fsync_s) = (each?.unwrap_or_default(), fsync_s?);
    if each && fsync_s.is_some() {
        table.fault("fsync_s", "stands beside fsync = \"interval\" only");
        return None;
    }
    let zero = |key, most| {
        optional(table.optional(key), |item| {
            item.integer_because::<u64>(0..=most, "0 means that there is no such bound")
        })
    };
    let (mib, hours, keep) = (zero("rotate_mib", 1 << 20), zero("rotate_hours", 24 * 366), zero("keep", 1_000_000));
    let some = |number: u64| Some(number).filter(|number| *number > 0);
    let rotate = Rotation {
        bytes: mib?.map_or(Some(TRAIL_ROTATE), |mib| some(mib << 20)),
        age: hours?.map_or(Some(TRAIL_ROTATE_AGE), |hours| some(hours).map(|hours| Duration::from_secs(hours * 3_600))),
        keep: keep?.and_then(some).and_then(|keep| usize::try_from(keep).ok()),
    };
    let fsync =
        if each { Fsync::Each } else { fsync_s.map_or(Fsync::default(), |s| Fsync::Interval(Duration::from_secs(s))) };
    Some(SinkKind::File { path, fsync, rotate })
}

/// The most seconds that are accepted for what happens at intervals.
const DAY: i64 = 86_400;

/// The further sinks: `[[audit.sink]]`.
fn sinks(table: &Table<'_>) -> Option<Vec<SinkConfig>> {
    let mut names = Once::new("sink");
    let tables = table.tables("sink");
    if let Some(table) = tables.get(crate::limits::SINKS_MAX) {
        table.fault("name", format!("more than {} sinks are not accepted", crate::limits::SINKS_MAX));
        return None;
    }
    let sinks: Vec<_> = tables.iter().map(|table| sink(table, &mut names)).collect();
    sinks.into_iter().collect()
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Stdout,
    Syslog,
    Https,
}

fn sink(table: &Table<'_>, names: &mut Once<String>) -> Option<SinkConfig> {
    let name = table.required("name").and_then(|item| {
        // A name as agents have them: it is a label of metrics.
        let name = item.parse::<AgentId>()?.to_string();
        if ["file", "stdout"].contains(&name.as_str()) {
            return item.reject("this is the name of the sink that `file` or `stdout` stands for: choose another");
        }
        names.first(name.clone(), &item).then_some(name)
    });
    let required = optional(table.optional("required"), Item::boolean).map(Option::unwrap_or_default);
    let only =
        optional(table.optional("only"), |item| item.choice(&[("all", Content::All), ("heads", Content::Heads)]));
    let kinds = [("file", Kind::File), ("stdout", Kind::Stdout), ("syslog", Kind::Syslog), ("https", Kind::Https)];
    let kind = match table.required("kind").and_then(|item| item.choice(&kinds))? {
        Kind::File => table.required("path").and_then(|item| item.path()).and_then(|path| file_sink(table, path)),
        Kind::Stdout => Some(SinkKind::Stdout),
        Kind::Syslog => collectors::syslog(table).map(SinkKind::Syslog),
        Kind::Https => collectors::https(table, required?).map(SinkKind::Https),
    };
    Some(SinkConfig { name: name?, kind: kind?, required: required?, only: only?.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;
    use crate::audit::sink::https::Format;
    use crate::document::Document;

    struct Place(TempDir);

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            let mut params = rcgen::CertificateParams::new(["caponier".to_owned()]).expect("a name");
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let key = rcgen::KeyPair::generate().expect("a key");
            let certificate = params.self_signed(&key).expect("a certificate").pem();
            for (name, text, mode) in [
                ("ca.pem", certificate.as_str(), 0o644),
                ("own.key", key.serialize_pem().as_str(), 0o600),
                ("token", "hunter2\n", 0o600),
                ("open-token", "hunter2\n", 0o644),
                ("two-tokens", "hunter2\nhunter2\n", 0o600),
                ("empty", "", 0o600),
            ] {
                fs::write(dir.path().join(name), text).expect("written");
                fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(mode)).expect("a mode");
            }
            Self(dir)
        }

        fn load(&self, text: &str) -> Result<Sinks, String> {
            let document = Document::parse(&self.0.path().join("c.toml"), text).expect("TOML");
            let sinks = audit(&document.root());
            document.finish(sinks).map_err(|faults| faults.to_string())
        }

        fn sink(&self, keys: &str) -> Result<SinkConfig, String> {
            let text = format!("[audit]\nstdout = true\n[[audit.sink]]\nname = \"siem\"\n{keys}\n");
            self.load(&text).map(|mut sinks| sinks.list.remove(1))
        }
    }

    #[test]
    fn a_syslog_collector() {
        let place = Place::new();
        let sink = place.sink("kind = \"syslog\"\nto = \"tcp://logs.example.com:601\"").expect("in order");
        assert_eq!((sink.name.as_str(), sink.required, sink.only), ("siem", false, Content::All));
        let SinkKind::Syslog(config) = sink.kind else { panic!("a syslog sink") };
        assert_eq!((config.place.to.to_string().as_str(), config.place.tls), ("logs.example.com:601", None));
        let sink = place.sink(
            "kind = \"syslog\"\nrequired = true\nonly = \"heads\"\nto = \"tls://[fd00::1]:6514\"\nca_file = \"ca.pem\"\n\
             certificate = \"ca.pem\"\nkey = \"own.key\"\nfacility = \"local3\"\nhostname = \"bastion\"\n\
             proxy = \"http://user:hunter2@proxy:3128\"",
        );
        let sink = sink.expect("in order");
        assert_eq!((sink.required, sink.only), (true, Content::Heads));
        assert!(!format!("{sink:?}").contains("hunter2"), "{sink:?}");
        let SinkKind::Syslog(config) = sink.kind else { panic!("a syslog sink") };
        assert!(config.place.tls.is_some() && config.place.proxy.is_some());
    }

    #[test]
    fn an_https_collector() {
        let place = Place::new();
        let keys =
            "kind = \"https\"\nurl = \"https://siem.example.com/in\"\nca_file = \"ca.pem\"\ntoken_file = \"token\"";
        let sink = place.sink(keys).expect("in order");
        assert!(!format!("{sink:?}").contains("hunter2"), "{sink:?}");
        let SinkKind::Https(config) = sink.kind else { panic!("an https sink") };
        assert_eq!((config.format, config.records), (Format::Caponier, crate::limits::HTTPS_RECORDS));
        assert_eq!(config.linger, crate::limits::HTTPS_LINGER);
        // Somebody waits for each record of a required one, unless they are to.
        let linger = |more: &str| match place.sink(&format!("{keys}\nrequired = true\n{more}")).expect("in order").kind
        {
            SinkKind::Https(config) => config.linger,
            other => panic!("{other:?}"),
        };
        assert_eq!((linger(""), linger("batch_ms = 20")), (Duration::ZERO, Duration::from_millis(20)));
    }

    #[test]
    fn what_is_wrong_with_a_collector_is_told_by_its_key() {
        let place = Place::new();
        let syslog = |keys: &str| format!("kind = \"syslog\"\nto = \"tls://h:6514\"\nca_file = \"ca.pem\"\n{keys}");
        let https = |keys: &str| format!("kind = \"https\"\nurl = \"https://h/\"\nca_file = \"ca.pem\"\n{keys}");
        for (keys, fault) in [
            ("".to_owned(), "audit.sink[0].kind: this key is missing"),
            ("kind = \"kafka\"".to_owned(), "audit.sink[0].kind"),
            ("kind = \"syslog\"".to_owned(), "audit.sink[0].to: this key is missing"),
            ("kind = \"syslog\"\nto = \"udp://h:514\"".to_owned(), "tls://HOST:PORT"),
            ("kind = \"syslog\"\nto = \"tls://h\"".to_owned(), "audit.sink[0].to"),
            ("kind = \"syslog\"\nto = \"tcp://h:601\"\nca_file = \"ca.pem\"".to_owned(), "this is for TLS"),
            (
                "kind = \"syslog\"\nto = \"tcp://h:601\"\nkey = \"own.key\"".to_owned(),
                "audit.sink[0].key: this is for TLS",
            ),
            (syslog("facility = \"kern\""), "audit.sink[0].facility: this is no facility"),
            (syslog("hostname = \"a b\""), "audit.sink[0].hostname"),
            (syslog("certificate = \"ca.pem\""), "a certificate without its key"),
            (syslog("key = \"own.key\""), "a key without its certificate"),
            (syslog("certificate = \"ca.pem\"\nkey = \"token\""), "audit.sink[0].key"),
            (syslog("proxy = \"ftp://hunter2@p:1\""), "audit.sink[0].proxy"),
            (syslog("url = \"https://h/\""), "url"),
            ("kind = \"syslog\"\nto = \"tls://h:1\"\nca_file = \"token\"".to_owned(), "audit.sink[0].ca_file"),
            ("kind = \"https\"".to_owned(), "audit.sink[0].url: this key is missing"),
            ("kind = \"https\"\nurl = \"http://h/\"".to_owned(), "in clear to this host alone"),
            ("kind = \"https\"\nurl = \"https://hunter2@h/\"".to_owned(), "token_file"),
            ("kind = \"https\"\nurl = \"http://127.0.0.1/\"\nca_file = \"ca.pem\"".to_owned(), "this is for TLS"),
            (https("token_file = \"absent\""), "audit.sink[0].token_file"),
            (https("token_file = \"open-token\""), "chmod 600"),
            (https("token_file = \"two-tokens\""), "must hold one line"),
            (https("token_file = \"empty\""), "must hold one line"),
            (https("format = \"xml\""), "audit.sink[0].format"),
            (https("batch_records = 0"), "audit.sink[0].batch_records"),
            (https("batch_ms = 3600000"), "audit.sink[0].batch_ms"),
            (https("required = 1"), "audit.sink[0].required"),
            (https("only = \"some\""), "audit.sink[0].only"),
        ] {
            let told = place.sink(&keys).expect_err(&keys);
            assert!(told.contains(fault), "{keys}\n{fault:?} is not in:\n{told}");
            assert!(!told.contains("hunter2"), "{told}");
        }
    }

    #[test]
    fn names_are_sinks_own_and_one_sink_is_required() {
        let place = Place::new();
        let sink = |name: &str, more: &str| {
            format!("[[audit.sink]]\nname = \"{name}\"\nkind = \"syslog\"\nto = \"tcp://h:601\"\n{more}\n")
        };
        for (text, fault) in [
            (format!("[audit]\nstdout = true\n{}{}", sink("a", ""), sink("a", "")), "sink a is there already"),
            (format!("[audit]\nstdout = true\n{}", sink("stdout", "")), "choose another"),
            (format!("[audit]\nstdout = true\n{}", sink("A b", "")), "audit.sink[0].name"),
            (format!("[audit]\n{}", sink("a", "")), "no sink is required"),
            ("[audit]\n".to_owned(), "nowhere to write to"),
        ] {
            let told = place.load(&text).expect_err(&text);
            assert!(told.contains(fault), "{text}\n{fault:?} is not in:\n{told}");
        }
        let sinks = place.load(&format!("[audit]\n{}", sink("a", "required = true"))).expect("in order");
        assert_eq!(sinks.list.len(), 1);
        let many: String = (0..=crate::limits::SINKS_MAX).map(|number| sink(&format!("s{number}"), "")).collect();
        let told = place.load(&format!("[audit]\nstdout = true\n{many}")).expect_err("too many");
        assert!(told.contains("more than 16 sinks"), "{told}");
    }
}
