//! Contexts for kubectl whose way to the API server is a loopback listener of `caponier forward`.
//!
//! Promised: what others have written stays as it is, unknown fields included, and an entry that is there already and says
//! something else is an error; files change as a whole or not at all, under the lock that kubectl takes; nobody but its owner
//! can read a file that was written. Comments are lost, as they are with kubectl.
//!
//! kubectl has one pool of authorities for the API server and for a proxy of `https://`, and shows its client certificate to
//! both. So a proxy here is one on loopback without TLS ([`Proxy`]), and the authority of the API server never holds another.

mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use yaml_serde::{Mapping, Value};

use self::file::{Document, Lock};
use crate::identity::AgentName;
use crate::target::{Host, Target};

pub use file::FileError;

/// What is to stand in the files.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// What the context, the cluster and the user are called.
    pub name: String,
    /// Behind which agent the API server is; noted beside the cluster, for people.
    pub agent: AgentName,
    /// The API server.
    pub server: Server,
    /// The name in its certificate, if that is another.
    pub server_name: Option<Host>,
    /// The authority of that certificate, in PEM; without it those of the system.
    pub authority: Option<Vec<u8>>,
    /// Our listener.
    pub proxy: Proxy,
    /// Who kubectl is to the API server. Without it a user of this name is taken as it is.
    pub credentials: Option<Credentials>,
    /// Make it the context that kubectl uses unless told otherwise.
    pub set_current: bool,
    /// Replace entries that say something else.
    pub overwrite: bool,
}

/// Who somebody is to an API server.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// The holder of a certificate.
    Certificate {
        /// Its file.
        certificate: PathBuf,
        /// Its key's.
        key: PathBuf,
    },
    /// Whoever the token in a file says.
    TokenFile(PathBuf),
    /// Whoever a program says.
    Exec {
        /// The program.
        command: String,
        /// What it is called with.
        arguments: Vec<String>,
    },
    /// A user that is there already.
    User(String),
}

/// The URL of an API server: `https://HOST[:PORT][/PATH]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server(String);

/// Why a text is no [`Server`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ServerError {
    /// Another scheme.
    #[error("the server must be https://HOST[:PORT]: anything else would go in clear beyond the tunnel")]
    Scheme,
    /// Not well formed.
    #[error("the server must be https://HOST[:PORT][/PATH], without user, query and fragment")]
    Form,
}

impl FromStr for Server {
    type Err = ServerError;

    fn from_str(text: &str) -> Result<Self, ServerError> {
        let rest = text.strip_prefix("https://").ok_or(ServerError::Scheme)?;
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let fits = |c: char| c.is_ascii_graphic() && !"?#@\\\"<>".contains(c);
        if !path.chars().all(fits) {
            return Err(ServerError::Form);
        }
        let ported = authority.ends_with(']') || !authority.contains(':');
        let target: Target = match ported {
            true => format!("{authority}:443").parse(),
            false => authority.parse(),
        }
        .map_err(|_| ServerError::Form)?;
        Ok(Self(format!("https://{target}{}", path.trim_end_matches('/'))))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where kubectl finds our listener: `http://ADDRESS:PORT` or `socks5://ADDRESS:PORT` on loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy(String);

/// Why a text is no [`Proxy`]. It is never repeated: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// A proxy with TLS.
    #[error(
        "a proxy of https:// is refused: kubectl takes one set of authorities for the proxy and the API server, and shows its \
         client certificate to both, so that whoever vouches for the one could stand for the other; name the loopback \
         listener of `caponier forward --http-proxy`, as http://127.0.0.1:8118"
    )]
    Tls,
    /// Somewhere else.
    #[error(
        "the proxy must be on loopback (127.0.0.1, [::1] or localhost), where `caponier forward` listens: the way from there on is \
         its affair, and protected"
    )]
    Elsewhere,
    /// With credentials.
    #[error("the proxy needs no credentials, and they would be kept in the file: leave them out")]
    Credentials,
    /// Not well formed.
    #[error("the proxy must be http://127.0.0.1:PORT or socks5://127.0.0.1:PORT")]
    Form,
}

impl FromStr for Proxy {
    type Err = ProxyError;

    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let (scheme, rest) = text.split_once("://").ok_or(ProxyError::Form)?;
        match scheme.to_ascii_lowercase().as_str() {
            "https" => return Err(ProxyError::Tls),
            "http" | "socks5" => {}
            _ => return Err(ProxyError::Form),
        }
        if rest.contains('@') {
            return Err(ProxyError::Credentials);
        }
        let target: Target = rest.strip_suffix('/').unwrap_or(rest).parse().map_err(|_| ProxyError::Form)?;
        let loopback = match &target.host {
            Host::Address(address) => IpAddr::is_loopback(address),
            Host::Name(name) => name.to_string() == "localhost",
        };
        if !loopback {
            return Err(ProxyError::Elsewhere);
        }
        Ok(Self(format!("{}://{target}", scheme.to_ascii_lowercase())))
    }
}

/// Why the files are as they were.
#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// An entry that says something else.
    #[error(
        "{} has a {what} {name} that {}; nothing was changed: choose another name with --context, or replace it with --overwrite",
        .path.display(),
        if *.ours { "says something else" } else { "is not one of ours" }
    )]
    Taken {
        /// Where it stands.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What it is called.
        name: String,
        /// Whether it carries our mark.
        ours: bool,
    },
    /// No such user.
    #[error("there is no user {name} in {}", .paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))]
    NoUser {
        /// Which.
        name: String,
        /// Where it was looked for.
        paths: Vec<PathBuf>,
    },
    /// The authority is none.
    #[error("the file of --certificate-authority {0}")]
    Authority(&'static str),
}

/// The files that kubectl would take: the one that is named, else those of `KUBECONFIG`, else the one in the home. Empty where
/// there is not even a home.
#[must_use]
pub fn files(named: Option<PathBuf>, variable: Option<&std::ffi::OsStr>, home: Option<&Path>) -> Vec<PathBuf> {
    if let Some(named) = named {
        return vec![named];
    }
    let listed: Vec<PathBuf> = variable.map(|paths| std::env::split_paths(paths).collect()).unwrap_or_default();
    let mut listed: Vec<PathBuf> = listed.into_iter().filter(|path| !path.as_os_str().is_empty()).collect();
    if listed.is_empty() {
        listed.extend(home.map(|home| home.join(".kube").join("config")));
    }
    let mut seen = Vec::new();
    listed.retain(|path| !seen.contains(path) && (seen.push(path.clone()), true).1);
    listed
}

/// Brings what is wanted into the files, and tells which of them have changed. As with kubectl, an entry that is there is
/// changed where it stands, and a new one goes into the first file that exists, or else the last is made. Waits for the locks
/// of the files, up to [`limits::KUBECONFIG_LOCK`](crate::limits::KUBECONFIG_LOCK) for each; dropping it leaves none.
///
/// # Errors
/// If a file cannot be used, or an entry is there already and says something else.
pub async fn merge(paths: &[PathBuf], wanted: &Wanted) -> Result<Vec<PathBuf>, KubeconfigError> {
    let wanted = Entries::of(wanted)?;
    // Only what is to change needs a lock: some of the files may be nobody's to write.
    let mut before = wanted.changed(&read(paths)?)?;
    loop {
        if before.is_empty() {
            return Ok(Vec::new());
        }
        let mut locks = Vec::new();
        // In the order of their names, as everybody else of ours does: two never wait for each other.
        for path in before.keys() {
            locks.push(Lock::take(path).await?);
        }
        let changed = wanted.changed(&read(paths)?)?;
        // Another one may have written meanwhile, to the effect that other files are to change. It cannot go on for ever: each
        // time, somebody else has.
        if !changed.keys().eq(before.keys()) {
            drop(locks);
            before = changed;
            continue;
        }
        for (path, document) in &changed {
            document.write(path)?;
        }
        return Ok(changed.into_keys().collect());
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<(PathBuf, Option<Document>)>, FileError> {
    paths.iter().map(|path| Ok((path.clone(), Document::read(path)?))).collect()
}

/// What is wanted, as it would stand in a file.
struct Entries {
    name: String,
    cluster: Value,
    context: Value,
    /// The user's name, and what it is to be; without the latter an existing one is taken as it is.
    user: (String, Option<Value>),
    /// Whether the user may not be made.
    existing: bool,
    set_current: bool,
    overwrite: bool,
}

impl Entries {
    fn of(wanted: &Wanted) -> Result<Self, KubeconfigError> {
        let mut cluster = Mapping::new();
        let mut set = |key: &str, value: Value| drop(cluster.insert(key.into(), value));
        if let Some(authority) = &wanted.authority {
            set("certificate-authority-data", STANDARD.encode(judged(authority)?).into());
        }
        let mut about = Mapping::new();
        about.insert("agent".into(), wanted.agent.to_string().into());
        let mark = [("name", MARK.into()), ("extension", Value::Mapping(about))];
        set("extensions", Value::Sequence(vec![mapping(mark)]));
        set("proxy-url", wanted.proxy.0.clone().into());
        set("server", wanted.server.0.clone().into());
        if let Some(name) = &wanted.server_name {
            set("tls-server-name", name.to_string().into());
        }
        let path = |path: &Path| Value::from(path.display().to_string());
        let user = match &wanted.credentials {
            None | Some(Credentials::User(_)) => None,
            Some(Credentials::Certificate { certificate, key }) => {
                Some(mapping([("client-certificate", path(certificate)), ("client-key", path(key))]))
            }
            Some(Credentials::TokenFile(file)) => Some(mapping([("tokenFile", path(file))])),
            Some(Credentials::Exec { command, arguments }) => {
                let arguments = arguments.iter().map(|word| Value::from(word.as_str())).collect();
                let exec = mapping([
                    ("apiVersion", "client.authentication.k8s.io/v1".into()),
                    ("args", Value::Sequence(arguments)),
                    ("command", command.as_str().into()),
                    ("env", Value::Null),
                    ("interactiveMode", "IfAvailable".into()),
                    ("provideClusterInfo", false.into()),
                ]);
                Some(mapping([("exec", exec)]))
            }
        };
        let (user_name, existing) = match &wanted.credentials {
            Some(Credentials::User(name)) => (name.clone(), true),
            _ => (wanted.name.clone(), false),
        };
        Ok(Self {
            context: mapping([("cluster", wanted.name.as_str().into()), ("user", user_name.as_str().into())]),
            name: wanted.name.clone(),
            cluster: Value::Mapping(cluster),
            user: (user_name, user),
            existing,
            set_current: wanted.set_current,
            overwrite: wanted.overwrite,
        })
    }

    /// The documents that are to be written, by their files.
    fn changed(&self, files: &[(PathBuf, Option<Document>)]) -> Result<BTreeMap<PathBuf, Document>, KubeconfigError> {
        let mut changed: BTreeMap<PathBuf, Document> = BTreeMap::new();
        let existing = files.iter().find(|(_, document)| document.is_some());
        // The caller has made sure that there is a file.
        let Some((fresh, _)) = existing.or(files.last()) else { return Ok(changed) };
        let mut change = |path: &PathBuf, document: Option<&Document>, act: &dyn Fn(&mut Document)| {
            act(changed.entry(path.clone()).or_insert_with(|| document.cloned().unwrap_or_default()));
        };
        let document_of =
            |path: &PathBuf| files.iter().find(|(other, _)| other == path).and_then(|(_, it)| it.as_ref());

        for (kind, name, value) in [
            (CLUSTER, &self.name, Some(&self.cluster)),
            (USER, &self.user.0, self.user.1.as_ref()),
            (CONTEXT, &self.name, Some(&self.context)),
        ] {
            let found = files.iter().find_map(|(path, document)| Some((path, document.as_ref()?.entry(kind, name)?)));
            match (found, value) {
                // As it is, or as it was.
                (Some(_), None) => {}
                (Some((_, there)), Some(value)) if there == value => {}
                (Some((path, there)), Some(value)) => {
                    if !self.overwrite {
                        let (path, name) = (path.clone(), name.clone());
                        return Err(KubeconfigError::Taken { path, what: kind.one, name, ours: is_marked(there) });
                    }
                    change(path, document_of(path), &|document| document.set(kind, name, value.clone()));
                }
                (None, None) if self.existing => {
                    let paths = files.iter().map(|(path, _)| path.clone()).collect();
                    return Err(KubeconfigError::NoUser { name: name.clone(), paths });
                }
                (None, value) => {
                    let value = value.cloned().unwrap_or(Value::Mapping(Mapping::new()));
                    change(fresh, document_of(fresh), &|document| document.set(kind, name, value.clone()));
                }
            }
        }
        if self.set_current {
            let current = files.iter().find_map(|(path, document)| Some((path, document.as_ref()?.current()?)));
            let path = current.map_or(fresh, |(path, _)| path);
            if current.is_none_or(|(_, current)| current != self.name) {
                change(path, document_of(path), &|document| document.set_current(&self.name));
            }
        }
        Ok(changed)
    }
}

/// A list of a kubeconfig.
#[derive(Debug, Clone, Copy)]
struct Kind {
    list: &'static str,
    one: &'static str,
}

const CLUSTER: Kind = Kind { list: "clusters", one: "cluster" };
const USER: Kind = Kind { list: "users", one: "user" };
const CONTEXT: Kind = Kind { list: "contexts", one: "context" };

/// The name of the extension that says that an entry is ours.
const MARK: &str = "caponier";

fn is_marked(entry: &Value) -> bool {
    let extensions = entry.get("extensions").and_then(Value::as_sequence);
    extensions.is_some_and(|all| all.iter().any(|one| one.get("name").and_then(Value::as_str) == Some(MARK)))
}

fn mapping<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Mapping(fields.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

/// The authority, if it holds certificates and nothing else.
fn judged(pem: &[u8]) -> Result<&[u8], KubeconfigError> {
    let text = std::str::from_utf8(pem).map_err(|_| KubeconfigError::Authority("is not PEM"))?;
    let mut blocks = text.lines().filter_map(|line| line.trim().strip_prefix("-----BEGIN ")?.strip_suffix("-----"));
    let mut certificates = 0;
    for block in &mut blocks {
        match block {
            "CERTIFICATE" => certificates += 1,
            // It would become readable for whoever the file is given to.
            kind if kind.contains("PRIVATE KEY") => return Err(KubeconfigError::Authority("holds a private key")),
            _ => return Err(KubeconfigError::Authority("holds something else than certificates")),
        }
    }
    if certificates == 0 {
        return Err(KubeconfigError::Authority("holds no certificate in PEM"));
    }
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers() {
        for (text, normal) in [
            ("https://api.internal:6443", "https://api.internal:6443"),
            ("https://API.internal", "https://api.internal:443"),
            ("https://[2001:db8::1]:6443/", "https://[2001:db8::1]:6443"),
            ("https://10.0.0.1/k8s/clusters/c-1", "https://10.0.0.1:443/k8s/clusters/c-1"),
        ] {
            assert_eq!(text.parse::<Server>().map(|it| it.to_string()).as_deref(), Ok(normal));
        }
        for text in [
            "api.internal:6443",
            "http://api.internal",
            "https://",
            "https://a:0",
            "https://u@a",
            "https://a/?x",
            "https://a/#x",
        ] {
            assert!(text.parse::<Server>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_proxy_is_on_loopback_and_without_tls() {
        for text in ["http://127.0.0.1:8118", "http://localhost:8118/", "socks5://[::1]:1080", "HTTP://127.0.0.2:1"] {
            assert!(text.parse::<Proxy>().is_ok(), "{text}");
        }
        for (text, fault) in [
            ("https://127.0.0.1:8118", ProxyError::Tls),
            ("HTTPS://proxy.example:3128", ProxyError::Tls),
            ("http://10.0.0.1:3128", ProxyError::Elsewhere),
            ("http://localhost.example:3128", ProxyError::Elsewhere),
            ("http://0.0.0.0:3128", ProxyError::Elsewhere),
            ("http://u:p@127.0.0.1:3128", ProxyError::Credentials),
            ("http://127.0.0.1", ProxyError::Form),
            ("127.0.0.1:8118", ProxyError::Form),
            ("socks4://127.0.0.1:8118", ProxyError::Form),
        ] {
            assert_eq!(text.parse::<Proxy>(), Err(fault), "{text}");
        }
    }

    #[test]
    fn files_are_those_of_kubectl() {
        let home = Path::new("/home/x");
        let of = |named: Option<&str>, variable: Option<&str>| {
            files(named.map(PathBuf::from), variable.map(std::ffi::OsStr::new), Some(home))
        };
        assert_eq!(of(Some("/a"), Some("/b")), [PathBuf::from("/a")]);
        assert_eq!(of(None, Some("/b::/c:/b")), [PathBuf::from("/b"), PathBuf::from("/c")]);
        assert_eq!(of(None, Some("")), [PathBuf::from("/home/x/.kube/config")]);
        assert_eq!(of(None, None), [PathBuf::from("/home/x/.kube/config")]);
        assert!(files(None, None, None).is_empty());
    }

    #[test]
    fn an_authority_holds_certificates_alone() {
        let block = |kind: &str| format!("-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n");
        assert!(judged(block("CERTIFICATE").as_bytes()).is_ok());
        for text in
            [String::new(), block("PRIVATE KEY"), block("CERTIFICATE") + &block("EC PRIVATE KEY"), block("X509 CRL")]
        {
            assert!(judged(text.as_bytes()).is_err(), "{text}");
        }
    }
}
