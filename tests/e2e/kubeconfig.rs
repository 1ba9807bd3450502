//! `caponier kubeconfig`, judged by kubectl itself.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{Said, caponier, run};

/// A home with the files that kubectl and we look for.
struct Home(TempDir);

const SERVER: &str = "https://api.internal:6443";

impl Home {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("caponier-e2e-").tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, text).expect("written");
        path
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("a file")
    }

    fn ours(&self, arguments: &[&str]) -> Command {
        let mut command = caponier();
        command.args(["kubeconfig", "acme/prod-eu", "--server", SERVER]).args(arguments);
        command.env("HOME", self.0.path()).env_remove("KUBECONFIG").current_dir(self.0.path());
        command
    }

    fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()));
        command.args(arguments).env("HOME", self.0.path()).env_remove("KUBECONFIG").current_dir(self.0.path());
        command
    }

    /// What kubectl makes of a file, secrets included.
    async fn view(&self, file: &Path) -> Value {
        let said = run(self.kubectl(&["config", "view", "--raw", "-o", "json", "--kubeconfig"]).arg(file)).await.done();
        serde_json::from_str(&said).expect("JSON")
    }

    /// What kubectl makes of all files of `KUBECONFIG`.
    async fn view_all(&self, files: &str) -> Value {
        let mut command = self.kubectl(&["config", "view", "--raw", "-o", "json"]);
        serde_json::from_str(&run(command.env("KUBECONFIG", files)).await.done()).expect("JSON")
    }
}

/// The entry of a name in a list.
fn entry<'a>(config: &'a Value, list: &str, one: &str, name: &str) -> &'a Value {
    let all = config[list].as_array().unwrap_or_else(|| panic!("no {list} in {config}"));
    let found: Vec<_> = all.iter().filter(|entry| entry["name"] == name).collect();
    assert_eq!(found.len(), 1, "{name} in {config}");
    &found[0][one]
}

fn authority() -> String {
    let key = rcgen::KeyPair::generate().expect("a key");
    rcgen::CertificateParams::new(["ca.test".to_owned()]).expect("names").self_signed(&key).expect("signed").pem()
}

/// One of somebody else's, with fields that we know nothing of.
const FOREIGN: &str = "\
# a comment
apiVersion: v1
kind: Config
current-context: theirs
preferences: {colors: true}
unknown-field: {deep: [1, '0123', 2.5, null]}
clusters:
- name: theirs
  cluster: {server: 'https://theirs.example', insecure-skip-tls-verify: true, disable-compression: true}
contexts:
- {name: theirs, context: {cluster: theirs, user: theirs, namespace: 'true', extensions: [{name: x.io, extension: {at: 'Tue, 05 May 2026 10:00:00 UTC'}}]}}
users:
- name: theirs
  user:
    username: '1e3'
    password: \"0123\"
    auth-provider: {name: oidc, config: {idp-issuer-url: 'https://issuer', id-token: 'a: #b'}}
";

#[tokio::test]
async fn kubectl_reads_what_was_written_and_nothing_changes_the_second_time() {
    let home = Home::new();
    let ca = authority();
    home.write("ca.pem", &ca);
    let arguments = [
        "--certificate-authority",
        "ca.pem",
        "--client-certificate",
        "me.pem",
        "--client-key",
        "keys/me.key",
        "--tls-server-name",
        "kubernetes",
        "--context",
        "prod",
    ];
    let said = run(&mut home.ours(&arguments)).await.done();
    let file = home.path(".kube/config");
    assert_eq!(said, format!("wrote context prod to {}\n", file.display()));
    let config = home.view(&file).await;
    let cluster = entry(&config, "clusters", "cluster", "prod");
    let data = cluster["certificate-authority-data"].as_str().expect("an authority");
    assert_eq!(
        base64::Engine::decode(&base64::engine::general_purpose::STANDARD, data).expect("base64"),
        ca.as_bytes()
    );
    assert_eq!(
        (&cluster["server"], &cluster["proxy-url"], &cluster["tls-server-name"]),
        (&json!(SERVER), &json!("http://127.0.0.1:8118"), &json!("kubernetes"))
    );
    assert_eq!(cluster["extensions"], json!([{"name": "caponier", "extension": {"agent": "acme/prod-eu"}}]));
    assert!(cluster.get("insecure-skip-tls-verify").is_none());
    let user = entry(&config, "users", "user", "prod");
    assert_eq!(user["client-certificate"], json!(home.path("me.pem")));
    assert_eq!(user["client-key"], json!(home.path("keys/me.key")));
    assert_eq!(*entry(&config, "contexts", "context", "prod"), json!({"cluster": "prod", "user": "prod"}));
    assert_eq!(config["current-context"], "", "nobody has asked for another one");
    assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o600);
    assert!(!home.path(".kube/config.lock").exists());

    let before = (home.read(".kube/config"), fs::metadata(&file).expect("a file").ino());
    assert_eq!(run(&mut home.ours(&arguments)).await.done(), "context prod is there already\n");
    assert_eq!((home.read(".kube/config"), fs::metadata(&file).expect("a file").ino()), before);
    // Nor after kubectl has rewritten the file in its own way.
    run(&mut home.kubectl(&["config", "set-context", "other", "--cluster", "prod"])).await.done();
    assert_ne!(home.read(".kube/config"), before.0);
    assert_eq!(run(&mut home.ours(&arguments)).await.done(), "context prod is there already\n");

    // Other credentials, and a user of kubectl's.
    home.write("token", "x");
    for (name, more, user) in [
        ("file", &["--token-file", "token"][..], json!({"tokenFile": home.path("token")})),
        (
            "exec",
            &["--exec", "aws", "--exec-arg", "eks", "--exec-arg", "--region=eu"],
            json!({"exec": {
                "apiVersion": "client.authentication.k8s.io/v1", "args": ["eks", "--region=eu"], "command": "aws",
                "env": null, "interactiveMode": "IfAvailable", "provideClusterInfo": false,
            }}),
        ),
        ("none", &["--proxy-url", "socks5://localhost:1080"], json!({})),
    ] {
        let arguments = [&["--context", name][..], more].concat();
        run(&mut home.ours(&arguments)).await.done();
        assert_eq!(*entry(&home.view(&file).await, "users", "user", name), user);
        run(&mut home.kubectl(&["config", "set-context", "other", "--namespace", name])).await.done();
        assert_eq!(run(&mut home.ours(&arguments)).await.done(), format!("context {name} is there already\n"));
    }
    // What somebody gives the user later stays.
    run(&mut home.kubectl(&["config", "set-credentials", "none", "--token", "secret"])).await.done();
    run(&mut home.ours(&["--context", "none", "--proxy-url", "socks5://localhost:1080"])).await.done();
    assert_eq!(*entry(&home.view(&file).await, "users", "user", "none"), json!({"token": "secret"}));
    run(&mut home.ours(&["--context", "shared", "--user", "none", "--set-current"])).await.done();
    let config = home.view(&file).await;
    assert_eq!(*entry(&config, "contexts", "context", "shared"), json!({"cluster": "shared", "user": "none"}));
    assert_eq!(config["current-context"], "shared");
}

#[tokio::test]
async fn what_is_there_stays_as_it_is() {
    let home = Home::new();
    let file = home.write(".kube/config", FOREIGN);
    let before = home.view(&file).await;
    run(&mut home.ours(&[])).await.done();
    let mut after = home.view(&file).await;
    for (list, name) in [("clusters", "acme/prod-eu"), ("contexts", "acme/prod-eu"), ("users", "acme/prod-eu")] {
        let list = after[list].as_array_mut().expect("a list");
        let count = list.len();
        list.retain(|entry| entry["name"] != name);
        assert_eq!(list.len() + 1, count);
    }
    assert_eq!(after, before, "the current context included");
    let text = home.read(".kube/config");
    assert!(text.contains("unknown-field") && text.contains("'0123'"), "{text}");

    // Not by another name either: each of the three may be taken.
    for (what, foreign) in [
        ("cluster", "clusters: [{name: taken, cluster: {server: 'https://theirs'}}]"),
        ("user", "users: [{name: taken, user: {token: secret}}]"),
        ("context", "contexts: [{name: taken, context: {cluster: a, user: taken}}]"),
    ] {
        let file = home.write("taken", foreign);
        let arguments = ["--kubeconfig", "taken", "--context", "taken", "--token-file", "token"];
        let said = run(&mut home.ours(&arguments)).await;
        assert_eq!((said.code(), said.stdout.as_str()), (1, ""), "{said:?}");
        assert!(said.stderr.contains(&format!("taken has a {what} taken that is not one of ours")), "{said:?}");
        assert!(!said.stderr.contains("secret"), "{said:?}");
        assert_eq!(home.read("taken"), foreign);
        assert!(!home.path("taken.lock").exists());
        run(home.ours(&arguments).arg("--overwrite")).await.done();
        let config = home.view(&file).await;
        assert_eq!(entry(&config, "clusters", "cluster", "taken")["server"], SERVER);
        assert_eq!(entry(&config, "users", "user", "taken")["tokenFile"], json!(home.path("token")));
    }
    // One of ours, to another server.
    let said = run(&mut home.ours(&["--server", "https://other.internal:6443"])).await;
    // clap takes one --server only.
    assert_eq!(said.code(), 2, "{said:?}");
    let said = run(&mut home.ours(&["--proxy-url", "http://127.0.0.1:8119"])).await;
    assert_eq!(said.code(), 1);
    assert!(said.stderr.contains("cluster acme/prod-eu that says something else"), "{said:?}");
    let said = run(&mut home.ours(&["--context", "new", "--user", "nobody"])).await;
    assert!(said.code() == 1 && said.stderr.contains("there is no user nobody"), "{said:?}");

    // What cannot be changed without harm is not touched.
    for text in ["- a list\n", "kind: Secret\n", "a: {b: yes}\n", "clusters: [", "users: !x []\n"] {
        home.write("odd", text);
        let said = run(&mut home.ours(&["--kubeconfig", "odd"])).await;
        assert_eq!(said.code(), 1, "{text}: {said:?}");
        assert_eq!(home.read("odd"), text);
    }
}

#[tokio::test]
async fn what_is_no_ordinary_file_is_neither_waited_for_nor_replaced() {
    let home = Home::new();
    symlink("nowhere", home.path("dangling")).expect("a link");
    symlink("/dev/null", home.path("null")).expect("a link");
    run(Command::new("mkfifo").arg(home.path("pipe"))).await.done();
    for (name, words) in
        [("dangling", "what it leads to is not there"), ("null", "no ordinary file"), ("pipe", "no ordinary file")]
    {
        let before = fs::symlink_metadata(home.path(name)).expect("it is there");
        let said = run(&mut home.ours(&["--kubeconfig", name])).await;
        assert!(said.code() == 1 && said.stderr.contains(words), "{name}: {said:?}");
        let after = fs::symlink_metadata(home.path(name)).expect("it is there");
        assert_eq!((after.file_type(), after.ino()), (before.file_type(), before.ino()), "{name}");
    }
}

#[tokio::test]
async fn several_files_are_changed_where_kubectl_would() {
    let home = Home::new();
    let files = [home.path("none"), home.path("one"), home.path("two")];
    let list = std::env::join_paths(&files).expect("paths").into_string().expect("text");
    let ours = |arguments: &[&str]| {
        let mut command = home.ours(arguments);
        command.env("KUBECONFIG", &list);
        command
    };
    // Where none exists, the last is made.
    run(&mut ours(&["--context", "first"])).await.done();
    assert!(!files[0].exists() && !files[1].exists());
    entry(&home.view(&files[2]).await, "clusters", "cluster", "first");
    // A new one goes into the first that exists, and an old one stays where it is.
    home.write("one", FOREIGN);
    run(&mut ours(&["--context", "second"])).await.done();
    entry(&home.view(&files[1]).await, "clusters", "cluster", "second");
    run(&mut ours(&["--context", "first", "--proxy-url", "http://127.0.0.1:9", "--overwrite"])).await.done();
    assert_eq!(entry(&home.view(&files[2]).await, "clusters", "cluster", "first")["proxy-url"], "http://127.0.0.1:9");
    // The current context is set where it stands, or else kubectl would go on with the other.
    run(&mut ours(&["--context", "second", "--set-current"])).await.done();
    let all = home.view_all(&list).await;
    assert_eq!(all["current-context"], "second");
    assert_eq!(home.view(&files[2]).await["current-context"], "");
    for name in ["first", "second", "theirs"] {
        entry(&all, "contexts", "context", name);
    }
    assert!(!files[0].exists());

    // What a link leads to is written, and the link stays.
    let linked = home.path("link");
    symlink("two", &linked).expect("a link");
    run(&mut home.ours(&["--context", "third", "--kubeconfig", "link"])).await.done();
    assert!(fs::symlink_metadata(&linked).expect("a link").is_symlink());
    entry(&home.view(&files[2]).await, "clusters", "cluster", "third");
}

#[tokio::test]
async fn many_at_once_lose_nothing_and_a_lock_is_respected() {
    let home = Home::new();
    let names: Vec<String> = (0..8).map(|number| format!("context-{number}")).collect();
    let mut children = Vec::new();
    for name in &names {
        children
            .push(home.ours(&["--context", name]).stdout(Stdio::null()).kill_on_drop(true).spawn().expect("it starts"));
    }
    for mut child in children {
        assert!(child.wait().await.expect("its end").success());
    }
    let config = home.view(&home.path(".kube/config")).await;
    for name in &names {
        entry(&config, "contexts", "context", name);
    }
    let left: Vec<_> =
        fs::read_dir(home.path(".kube")).expect("a folder").map(|it| it.expect("a file").file_name()).collect();
    assert_eq!(left, ["config"]);

    let lock = home.write(".kube/config.lock", "");
    let before = home.read(".kube/config");
    let said = run(&mut home.ours(&["--context", "late"])).await;
    assert!(said.code() == 1 && said.stderr.contains("config.lock is there"), "{said:?}");
    assert_eq!(home.read(".kube/config"), before);
    assert!(lock.exists(), "it is not ours to take away");
    // What is to stay as it is needs no lock.
    run(&mut home.ours(&["--context", &names[0]])).await.done();
}

#[tokio::test]
async fn what_would_be_unsafe_is_refused_with_its_reason() {
    let home = Home::new();
    let ca = authority();
    let key = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    home.write("both.pem", &(ca.clone() + &key));
    home.write("none.pem", "nothing");
    let refused = |said: &Said, code: i32, words: &str| {
        assert_eq!((said.code(), said.stdout.as_str()), (code, ""), "{said:?}");
        assert!(said.stderr.contains(words), "{words:?} in {said:?}");
        assert!(!said.stderr.contains("hunter2"), "{said:?}");
        assert!(!home.path(".kube").exists());
    };
    for (arguments, code, words) in [
        (&["--proxy-url", "https://127.0.0.1:8118"][..], 2, "one set of authorities"),
        (&["--proxy-url", "https://user:hunter2@127.0.0.1:8118"], 2, "one set of authorities"),
        (&["--proxy-url", "http://proxy.example:3128"], 2, "on loopback"),
        (&["--proxy-url", "http://user:hunter2@127.0.0.1:8118"], 2, "no credentials"),
        (&["--certificate-authority", "both.pem"], 1, "holds a private key"),
        (&["--certificate-authority", "none.pem"], 1, "no certificate"),
        (&["--certificate-authority", "absent.pem"], 2, "could not read"),
        (&["--client-certificate", "a.pem"], 2, "--client-key"),
        (&["--token-file", "a", "--exec", "b"], 2, "cannot be used with"),
        (&["--context", ""], 2, "name"),
        (&["--insecure-skip-tls-verify"], 2, "unexpected"),
    ] {
        refused(&run(&mut home.ours(arguments)).await, code, words);
    }
    let mut clear = caponier();
    clear.args(["kubeconfig", "acme/prod-eu", "--server", "http://api.internal:8080"]).env("HOME", home.0.path());
    refused(&run(&mut clear).await, 2, "in clear");
    let said = run(home.ours(&[]).env_remove("HOME")).await;
    refused(&said, 2, "--kubeconfig");
}
