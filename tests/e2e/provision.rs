//! Provisioning against a real server, without a tunnel.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use caponier::chain::Chain;
use caponier::postgres::{Failure, Identifier, Login};
use caponier::provision::{
    Connect, Database, Event, Extension, Grant, Grantee, Instance, Outcome, Output, Privilege, ProvisionError,
    Resources, Role, Tls, apply, destroy, observe, plan,
};
use caponier::secret::Secret;
use caponier::target::Target;
use caponier::task::Tasks;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::postgres::{Postgres, SUPERUSER_PASSWORD, bin_directories};

/// Straight to the server, whatever the target says.
struct Direct(SocketAddr);

impl Connect for Direct {
    type Stream = TcpStream;

    async fn connect(&self, _target: &Target) -> Result<TcpStream, Box<dyn Error + Send + Sync>> {
        Ok(TcpStream::connect(self.0).await?)
    }
}

/// Who administers: every test has to pass with both.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Who {
    Superuser,
    Plain,
}

struct Bench {
    server: Postgres,
    connect: Direct,
    directory: tempfile::TempDir,
    who: Who,
}

const HOST: &str = "orders.db.internal";
const PLAIN_PASSWORD: &str = "plain-secret-of-the-test";

impl Bench {
    async fn start(bin: &Path, who: Who) -> Self {
        let server = Postgres::start_from(bin, HOST).await;
        server
            .run(
                "postgres",
                &[
                    &format!("CREATE ROLE provisioner LOGIN CREATEROLE CREATEDB PASSWORD '{PLAIN_PASSWORD}'"),
                    "CREATE ROLE stranger LOGIN PASSWORD 'stranger'",
                ],
            )
            .await;
        let connect = Direct(server.address);
        Self { server, connect, directory: tempfile::tempdir().expect("directory"), who }
    }

    /// One server of each version for each kind of administrator.
    async fn each(test: impl AsyncFn(&Self)) {
        for bin in bin_directories() {
            for who in [Who::Superuser, Who::Plain] {
                eprintln!("--- {} as {who:?}", bin.display());
                test(&Self::start(&bin, who).await).await;
            }
        }
    }

    fn output(&self) -> PathBuf {
        self.directory.path().join("credentials.json")
    }

    fn resources(&self) -> Resources {
        resources(self.who, self.server.ca_file(), self.output())
    }

    async fn apply(&self, resources: &Resources) -> Result<Outcome, ProvisionError> {
        apply(&self.connect, resources, false, &mut std::io::sink(), &mut narrate).await
    }

    async fn rotate(&self, resources: &Resources) -> Result<Outcome, ProvisionError> {
        apply(&self.connect, resources, true, &mut std::io::sink(), &mut narrate).await
    }

    /// Runs with standard output as the output; returns what was printed.
    async fn printed(&self, rotate: bool) -> Value {
        let mut text = Vec::new();
        let resources = Resources { output: Output::Stdout, ..self.resources() };
        apply(&self.connect, &resources, rotate, &mut text, &mut narrate).await.expect("apply");
        serde_json::from_slice(&text).expect("JSON")
    }

    async fn login(&self, user: &str, password: &str, database: &str) -> Result<tokio_postgres::Client, Failure> {
        let config = caponier::tls::client(Some(&self.server.ca_file())).expect("TLS");
        let mut make = MakeRustlsConnect::new((*config).clone());
        let Ok(tls) = MakeTlsConnect::<TcpStream>::make_tls_connect(&mut make, HOST);
        let stream = TcpStream::connect(self.connect.0).await.expect("connection");
        let password = Secret::new(password.to_owned());
        let login = Login { user, password: Some(&password), database };
        caponier::postgres::open(stream, Some(tls), login, &Tasks::new()).await
    }

    /// That every credential in the output file logs in, as its own role, to its own database.
    async fn credentials_log_in(&self) {
        let entries = entries(&fs::read_to_string(self.output()).expect("output file"));
        assert!(!entries.is_empty());
        for ((database, user), password) in &entries {
            let password = password.as_deref().expect("a password");
            let client = self.login(user, password, database).await.unwrap_or_else(|error| panic!("{user}: {error}"));
            let row = client.query_one("SELECT current_user::text", &[]).await.expect("a query");
            assert_eq!(row.get::<_, String>(0), *user);
        }
    }

    async fn count(&self, query: &str) -> i64 {
        self.server.superuser("postgres").await.query_one(query, &[]).await.expect(query).get(0)
    }
}

fn narrate(event: &Event<'_>) -> ControlFlow<()> {
    eprintln!("{event}");
    ControlFlow::Continue(())
}

/// Says stop before the event with this number.
fn stop_at(number: usize) -> impl FnMut(&Event<'_>) -> ControlFlow<()> + Send {
    let mut seen = 0;
    move |event| {
        seen += 1;
        if seen > number {
            eprintln!("stopped before {event}");
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

fn name(text: &str) -> Identifier {
    Identifier::new(text).expect(text)
}

fn resources(who: Who, ca_file: PathBuf, output: PathBuf) -> Resources {
    let (user, password) = match who {
        Who::Superuser => ("postgres", SUPERUSER_PASSWORD),
        Who::Plain => ("provisioner", PLAIN_PASSWORD),
    };
    Resources {
        id: "acme/prod-eu".parse().expect("id"),
        instance: Instance {
            target: format!("{HOST}:5432").parse().expect("target"),
            database: name("postgres"),
            user: name(user),
            password: Some(Secret::new(password.to_owned())),
            login_suffix: None,
            tls: Tls::VerifyFull { name: None, ca_file: Some(ca_file) },
        },
        databases: vec![orders()],
        roles: vec![Role { name: name("reporter"), member_of: Vec::new() }],
        output: Output::File(output),
    }
}

fn orders() -> Database {
    Database {
        name: name("orders"),
        owner: name("orders"),
        template: None,
        encoding: None,
        connection_limit: Some(17),
        extensions: vec![
            Extension { name: name("pgcrypto"), schema: Some(name("extensions")), version: None },
            Extension { name: name("citext"), schema: None, version: Some("1.6".into()) },
        ],
        grants: vec![
            Grant { to: Grantee::Role(name("reporter")), schema: None, privileges: vec![Privilege::Connect] },
            Grant {
                to: Grantee::Role(name("reporter")),
                schema: Some(name("extensions")),
                privileges: vec![Privilege::Usage],
            },
        ],
    }
}

/// Database and user → password.
fn entries(text: &str) -> BTreeMap<(String, String), Option<String>> {
    let Value::Array(items) = serde_json::from_str(text).expect("JSON") else { panic!("no array: {text}") };
    let entry = |item: &Value| {
        assert_eq!(item["host"], HOST);
        assert_eq!(item["port"], 5432);
        let text = |key: &str| item[key].as_str().map(str::to_owned);
        ((text("name").expect("name"), text("username").expect("username")), text("password"))
    };
    items.iter().map(entry).collect()
}

#[tokio::test]
async fn provisions_what_is_wanted_and_nothing_the_second_time() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        bench.apply(&resources).await.unwrap_or_else(|error| panic!("{}", Chain(&error)));
        bench.credentials_log_in().await;
        let text = fs::read_to_string(bench.output()).expect("output");
        assert_eq!(fs::metadata(bench.output()).expect("metadata").permissions().mode() & 0o777, 0o600);
        let entries = entries(&text);
        assert_eq!(entries.len(), 2);
        for password in entries.values().flatten() {
            assert!(password.len() >= 32);
            assert!(!bench.server.log().contains(password), "a password reached the server");
        }
        assert!(bench.server.log().contains("SCRAM-SHA-256$"));

        // The owner can do what owners do, and has the extensions; others cannot connect, however they ask.
        let password = entries[&("orders".into(), "orders".into())].clone().expect("password");
        let owner = bench.login("orders", &password, "orders").await.expect("login");
        owner.batch_execute("CREATE SCHEMA app; CREATE TABLE app.t (a public.citext)").await.expect("owner's rights");
        owner.query_one("SELECT extensions.digest('a', 'sha256')", &[]).await.expect("pgcrypto in its schema");
        let refused = bench.login("stranger", "stranger", "orders").await.expect_err("others cannot connect");
        assert_eq!(refused.code(), Some("42501"), "{refused}");
        assert_eq!(bench.count("SELECT datconnlimit::int8 FROM pg_database WHERE datname = 'orders'").await, 17);

        let again = bench.apply(&resources).await.expect("second run");
        assert_eq!(again.steps, 0);
        assert_eq!(fs::read_to_string(bench.output()).expect("output"), text);
        let observed = observe(&bench.connect, &resources, &mut narrate).await.expect("observe");
        assert!(plan(&resources, &observed, false).is_empty());

        // What changes in the resources is brought about; a lost entry for a known password is written again.
        let mut changed = resources.clone();
        changed.databases[0].connection_limit = Some(5);
        changed.databases.push(Database { name: name("orders-archive"), extensions: Vec::new(), ..orders() });
        bench.apply(&changed).await.expect("changed");
        bench.credentials_log_in().await;
        assert_eq!(bench.count("SELECT datconnlimit::int8 FROM pg_database WHERE datname = 'orders'").await, 5);
        assert_eq!(self::entries(&fs::read_to_string(bench.output()).expect("output")).len(), 3);
    })
    .await;
}

#[tokio::test]
async fn completes_after_a_stop_at_any_point() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        let files = || -> Vec<PathBuf> {
            fs::read_dir(bench.directory.path()).expect("directory").flatten().map(|entry| entry.path()).collect()
        };
        let mut stops = 0;
        loop {
            let sink = &mut std::io::sink();
            match apply(&bench.connect, &resources, false, sink, &mut stop_at(stops)).await {
                Ok(_) => break,
                Err(ProvisionError::Stopped) => (),
                Err(error) => panic!("stopped at {stops}: {}", Chain(&error)),
            }
            bench.apply(&resources).await.unwrap_or_else(|error| panic!("after {stops}: {}", Chain(&error)));
            bench.credentials_log_in().await;
            // Taking away is stopped, too. Then only what is ours is gone, and nothing is left behind.
            let _ = destroy(&bench.connect, &resources, &mut stop_at(stops)).await;
            destroy(&bench.connect, &resources, &mut narrate).await.unwrap_or_else(|e| panic!("{}", Chain(&e)));
            assert_eq!(files(), Vec::<PathBuf>::new());
            // What is half made is taken away as well as what is whole; a few places will do, since it takes its time.
            if stops % 4 == 0 {
                let _ = apply(&bench.connect, &resources, false, &mut std::io::sink(), &mut stop_at(stops)).await;
                destroy(&bench.connect, &resources, &mut narrate).await.unwrap_or_else(|e| panic!("{}", Chain(&e)));
                assert_eq!(destroy(&bench.connect, &resources, &mut narrate).await.expect("again").steps, 0);
                assert_eq!(files(), Vec::<PathBuf>::new());
            }
            assert_eq!(bench.count("SELECT count(*) FROM pg_roles WHERE rolname IN ('orders', 'reporter')").await, 0);
            stops += 1;
        }
        assert!(stops > 20, "only {stops} places to stop at");
        assert_eq!(files(), [bench.output()]);
    })
    .await;
}

#[tokio::test]
async fn completes_after_kill_nine() {
    Bench::each(async |bench| {
        let mut kills = 0;
        // Every third place, since each takes a process; all of them are stopped at in the test above.
        for place in (0..).step_by(3) {
            let this = std::env::current_exe().expect("this program");
            let child = std::process::Command::new(this)
                .args(["--exact", "provision::the_process_that_is_killed"])
                .env("CAPONIER_TEST_VICTIM_SERVER", bench.server.address.to_string())
                .env("CAPONIER_TEST_VICTIM_CA_FILE", bench.server.ca_file())
                .env("CAPONIER_TEST_VICTIM_DIRECTORY", bench.directory.path())
                .env("CAPONIER_TEST_VICTIM_USER", bench.resources().instance.user.as_str())
                .env("CAPONIER_TEST_VICTIM_PLACE", place.to_string())
                .output()
                .expect("a process");
            let killed = std::os::unix::process::ExitStatusExt::signal(&child.status) == Some(9);
            assert!(killed || child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
            bench.apply(&bench.resources()).await.unwrap_or_else(|e| panic!("after {place}: {}", Chain(&e)));
            bench.credentials_log_in().await;
            if !killed {
                break;
            }
            kills += 1;
            destroy(&bench.connect, &bench.resources(), &mut narrate).await.expect("destroy");
        }
        assert!(kills > 6, "only {kills} kills");
    })
    .await;
}

/// Not a test, but what the one above runs as a process of its own.
#[tokio::test]
async fn the_process_that_is_killed() {
    let variable = |name: &str| std::env::var(format!("CAPONIER_TEST_VICTIM_{name}"));
    let Ok(server) = variable("SERVER") else { return };
    let user = variable("USER").expect("user");
    let who = if user == "postgres" { Who::Superuser } else { Who::Plain };
    let ca_file = PathBuf::from(variable("CA_FILE").expect("authority"));
    let output = Path::new(&variable("DIRECTORY").expect("directory")).join("credentials.json");
    let place: usize = variable("PLACE").expect("place").parse().expect("a number");
    let mut seen = 0;
    let mut die = |_: &Event<'_>| {
        seen += 1;
        if seen > place {
            let this = rustix::process::getpid();
            rustix::process::kill_process(this, rustix::process::Signal::KILL).expect("kill");
        }
        ControlFlow::Continue(())
    };
    let connect = Direct(server.parse().expect("address"));
    apply(&connect, &resources(who, ca_file, output), false, &mut std::io::sink(), &mut die).await.expect("apply");
}

#[tokio::test]
async fn rotates_and_completes_a_rotation_that_was_stopped_anywhere() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        bench.apply(&resources).await.expect("apply");
        let mut stops = 0;
        loop {
            let before = entries(&fs::read_to_string(bench.output()).expect("output"));
            let sink = &mut std::io::sink();
            let result = apply(&bench.connect, &resources, true, sink, &mut stop_at(stops)).await;
            let stopped = matches!(result, Err(ProvisionError::Stopped));
            assert!(stopped || result.is_ok());
            // Without asking for a rotation again.
            bench.apply(&resources).await.unwrap_or_else(|error| panic!("after {stops}: {}", Chain(&error)));
            bench.credentials_log_in().await;
            assert!(!fs::read_to_string(bench.output()).expect("output").contains("next_password"));
            if !stopped {
                let after = entries(&fs::read_to_string(bench.output()).expect("output"));
                for (account, password) in before {
                    let password = password.expect("password");
                    assert_ne!(after[&account].as_ref(), Some(&password));
                    let refused = bench.login(&account.1, &password, &account.0).await.expect_err("the old password");
                    assert_eq!(refused.code(), Some("28P01"));
                }
                break;
            }
            stops += 1;
        }
        assert!(stops > 8, "only {stops} places to stop at");
    })
    .await;
}

#[tokio::test]
async fn prints_a_password_once() {
    Bench::each(async |bench| {
        let first = bench.printed(false).await;
        let password = first[0]["password"].as_str().expect("a password").to_owned();
        bench.login("orders", &password, "orders").await.expect("login");
        let second = bench.printed(false).await;
        assert_eq!(second[0]["password"], Value::Null);
        assert_eq!(second[0]["username"], "orders");
        bench.login("orders", &password, "orders").await.expect("the first is still good");
        let third = bench.printed(true).await;
        let fresh = third[0]["password"].as_str().expect("a password");
        bench.login("orders", fresh, "orders").await.expect("login");
        bench.login("orders", &password, "orders").await.expect_err("the first is replaced");
    })
    .await;
}

#[tokio::test]
async fn a_run_that_prints_can_be_stopped_anywhere_before_its_last_mark() {
    Bench::each(async |bench| {
        let resources = Resources { output: Output::Stdout, ..bench.resources() };
        for rotate in [false, true] {
            let mut stops = 0;
            loop {
                let sink = &mut std::io::sink();
                let stopped = apply(&bench.connect, &resources, rotate, sink, &mut stop_at(stops)).await.is_err();
                let printed = bench.printed(false).await;
                for entry in printed.as_array().expect("array") {
                    if let Some(password) = entry["password"].as_str() {
                        let user = entry["username"].as_str().expect("username");
                        bench.login(user, password, "orders").await.expect("what is printed logs in");
                    } else {
                        assert!(rotate || !stopped || stops > 5, "no password after {stops}");
                    }
                }
                if !stopped {
                    break;
                }
                if !rotate {
                    destroy(&bench.connect, &resources, &mut narrate).await.expect("destroy");
                }
                stops += 1;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn never_touches_what_is_not_ours() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        let state = "SELECT count(*) FROM (SELECT rolname FROM pg_roles UNION ALL SELECT datname FROM pg_database) it";
        let cases: [(&[&str], &[&str], &str); 4] = [
            (&["CREATE ROLE orders LOGIN"], &["DROP ROLE orders"], "was not made by caponier"),
            (&["CREATE DATABASE orders"], &["DROP DATABASE orders"], "belongs to the role"),
            (
                &[
                    "CREATE ROLE orders LOGIN",
                    "COMMENT ON ROLE orders IS 'caponier: managed by other/agent, password delivered'",
                    "CREATE DATABASE orders OWNER orders",
                ],
                &["DROP DATABASE orders", "DROP ROLE orders"],
                "another set of resources",
            ),
            (&["CREATE ROLE reporter SUPERUSER"], &["DROP ROLE reporter"], "was not made by caponier"),
        ];
        for (make, unmake, said) in cases {
            bench.server.run("postgres", make).await;
            let before = bench.count(state).await;
            let error = bench.apply(&resources).await.expect_err("a conflict");
            assert!(matches!(error, ProvisionError::Conflicts(_)), "{error}");
            assert!(error.to_string().contains(said), "{error}");
            let error = destroy(&bench.connect, &resources, &mut narrate).await.expect_err("a conflict");
            assert!(matches!(error, ProvisionError::Conflicts(_)), "{error}");
            assert_eq!(bench.count(state).await, before, "nothing was changed");
            assert!(!bench.output().exists());
            bench.server.run("postgres", unmake).await;
        }
        bench.apply(&resources).await.expect("free names");
        // A database that somebody gave to somebody else is no longer ours.
        bench.server.run("postgres", &["ALTER DATABASE orders OWNER TO stranger"]).await;
        for error in [
            bench.apply(&resources).await.expect_err("a conflict"),
            destroy(&bench.connect, &resources, &mut narrate).await.expect_err("a conflict"),
        ] {
            assert!(error.to_string().contains("stranger"), "{error}");
        }
        assert_eq!(bench.count("SELECT count(*) FROM pg_database WHERE datname = 'orders'").await, 1);
    })
    .await;
}

#[tokio::test]
async fn a_lost_output_file_is_an_error_and_not_a_new_password() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        bench.apply(&resources).await.expect("apply");
        let lost = fs::read(bench.output()).expect("output");
        fs::remove_file(bench.output()).expect("remove");
        let error = bench.apply(&resources).await.expect_err("lost");
        assert!(error.to_string().contains("--rotate"), "{error}");
        assert!(!bench.output().exists());
        bench.rotate(&resources).await.expect("rotate");
        bench.credentials_log_in().await;
        // A file that others can read, or that is something else, is refused as it is.
        fs::set_permissions(bench.output(), fs::Permissions::from_mode(0o640)).expect("mode");
        assert!(Chain(&bench.apply(&resources).await.expect_err("exposed")).to_string().contains("chmod 600"));
        fs::set_permissions(bench.output(), fs::Permissions::from_mode(0o600)).expect("mode");
        fs::write(bench.output(), "[{\"password\": \"hunter2\"}]").expect("write");
        let text = Chain(&bench.apply(&resources).await.expect_err("foreign")).to_string();
        assert!(text.contains("no output file of ours") && !text.contains("hunter2"), "{text}");
        // One of before the rotation holds passwords that no longer work: the file counts.
        fs::write(bench.output(), &lost).expect("write");
        bench.apply(&resources).await.expect("apply");
        bench.credentials_log_in().await;
        assert_eq!(fs::read(bench.output()).expect("output"), lost);
    })
    .await;
}

#[tokio::test]
async fn destroys_under_the_feet_of_its_sessions_and_keeps_the_entries_of_others() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        bench.apply(&resources).await.expect("apply");
        let mut items: Vec<Value> = serde_json::from_slice(&fs::read(bench.output()).expect("output")).expect("JSON");
        let password = items[0]["password"].as_str().expect("password").to_owned();
        items.push(serde_json::json!({
            "host": "other", "port": 5432, "name": "orders", "username": "orders", "password": "kept"
        }));
        fs::write(bench.output(), serde_json::to_vec(&items).expect("JSON")).expect("write");
        let session = bench.login("orders", &password, "orders").await.expect("login");
        destroy(&bench.connect, &resources, &mut narrate).await.unwrap_or_else(|error| panic!("{}", Chain(&error)));
        session.batch_execute("SELECT 1").await.expect_err("the session was ended");
        let left: Value = serde_json::from_slice(&fs::read(bench.output()).expect("output")).expect("JSON");
        assert_eq!(left.as_array().map(Vec::len), Some(1));
        assert_eq!(left[0]["password"], "kept");
        let gone =
            Resources { output: Output::File(bench.directory.path().join("gone/out.json")), ..bench.resources() };
        destroy(&bench.connect, &gone, &mut narrate).await.expect("without the output's directory");
    })
    .await;
}

#[tokio::test]
async fn copies_a_template_and_says_so_if_others_use_it() {
    Bench::each(async |bench| {
        let owner = if bench.who == Who::Plain { "provisioner" } else { "postgres" };
        bench.server.run("postgres", &[&format!("CREATE DATABASE seed OWNER {owner}")]).await;
        bench.server.run("seed", &["CREATE TABLE t AS SELECT 42 AS a", "CREATE EXTENSION citext VERSION '1.5'"]).await;
        let mut resources = bench.resources();
        resources.databases[0].template = Some(name("seed"));
        resources.databases[0].extensions.remove(0);
        resources.databases[0].grants.pop();

        let user = bench.server.superuser("seed").await;
        let error = bench.apply(&resources).await.expect_err("in use");
        assert!(error.to_string().contains("other sessions use the template"), "{}", Chain(&error));
        drop(user);
        // What the template brought along is brought to what is wanted. Only who made an extension may change it.
        let result = bench.apply(&resources).await;
        match bench.who {
            Who::Superuser => drop(result.unwrap_or_else(|error| panic!("{}", Chain(&error)))),
            Who::Plain => {
                let error = result.expect_err("not the extension's owner");
                assert!(error.to_string().contains("ALTER EXTENSION"), "{}", Chain(&error));
                bench.server.run("orders", &["ALTER EXTENSION citext UPDATE TO '1.6'"]).await;
                bench.apply(&resources).await.unwrap_or_else(|error| panic!("{}", Chain(&error)));
            }
        }
        bench.credentials_log_in().await;
        let orders = bench.server.superuser("orders").await;
        let row = orders
            .query_one("SELECT (SELECT a FROM t), (SELECT extversion FROM pg_extension WHERE extname = 'citext')", &[]);
        let row = row.await.expect("copied");
        assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1)), (42, "1.6".to_owned()));
        drop(orders);
        // What it brought along can be in the way, too.
        let mut blocked = resources.clone();
        let extensions = vec![Extension { name: name("citext"), schema: Some(name("extensions")), version: None }];
        blocked.databases.push(Database {
            name: name("blocked"),
            template: Some(name("seed")),
            extensions,
            ..orders_database_only()
        });
        let error = bench.apply(&blocked).await.expect_err("in another schema");
        assert!(matches!(error, ProvisionError::Blocked(_)), "{}", Chain(&error));
        destroy(&bench.connect, &blocked, &mut narrate).await.unwrap_or_else(|error| panic!("{}", Chain(&error)));
        assert_eq!(bench.count("SELECT count(*) FROM pg_database WHERE datname IN ('blocked', 'orders')").await, 0);
        let mut missing = resources.clone();
        missing.databases.push(Database {
            name: name("more"),
            template: Some(name("nowhere")),
            ..orders_database_only()
        });
        let error = bench.apply(&missing).await.expect_err("no template");
        assert!(error.to_string().contains("\"nowhere\""), "{error}");
    })
    .await;
}

fn orders_database_only() -> Database {
    Database { extensions: Vec::new(), grants: Vec::new(), ..orders() }
}

#[tokio::test]
async fn what_an_owner_plants_is_never_run() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        bench.apply(&resources).await.expect("apply");
        let text = fs::read_to_string(bench.output()).expect("output");
        let password = entries(&text)[&("orders".into(), "orders".into())].clone().expect("password");
        let owner = bench.login("orders", &password, "orders").await.expect("login");
        owner
            .batch_execute(
                "CREATE SCHEMA evil; CREATE TABLE evil.ran (a text); \
                 CREATE FUNCTION evil.trap(text, text) RETURNS bool LANGUAGE plpgsql AS \
                   $$ BEGIN INSERT INTO evil.ran VALUES (current_user); RETURN false; END $$; \
                 CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.trap); \
                 CREATE TABLE evil.pg_extension (extname text); CREATE TABLE evil.pg_namespace (nspname text); \
                 ALTER DATABASE orders SET search_path = evil, pg_catalog; ALTER DATABASE orders SET role = orders; \
                 ALTER DATABASE orders SET default_transaction_read_only = on",
            )
            .await
            .expect("planted");
        assert_eq!(bench.apply(&resources).await.expect("second run").steps, 0);
        let mut more = resources.clone();
        more.databases[0].extensions.push(Extension { name: name("hstore"), schema: None, version: None });
        bench.apply(&more).await.unwrap_or_else(|error| panic!("{}", Chain(&error)));
        let ran: i64 = owner.query_one("SELECT count(*) FROM evil.ran", &[]).await.expect("count").get(0);
        assert_eq!(ran, 0);
    })
    .await;
}

#[tokio::test]
async fn a_password_changed_at_the_server_becomes_the_files_again() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        bench.apply(&resources).await.expect("apply");
        bench
            .server
            .run("postgres", &["ALTER ROLE orders PASSWORD 'other'", "ALTER ROLE reporter PASSWORD NULL"])
            .await;
        bench.apply(&resources).await.expect("second run");
        bench.credentials_log_in().await;
        // A role that was taken its login by hand does not get it back behind that hand's back.
        bench.server.run("postgres", &["ALTER ROLE orders NOLOGIN"]).await;
        let error = bench.apply(&resources).await.expect_err("no login");
        assert!(error.to_string().contains("ALTER ROLE \"orders\" LOGIN"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn odd_names_are_only_names() {
    Bench::each(async |bench| {
        let mut resources = bench.resources();
        let odd = r#"we"ird'; DROP ROLE stranger; -- \ näme"#;
        resources.databases[0].name = name(odd);
        resources.databases[0].owner = name(odd);
        resources.databases[0].extensions[0].schema = Some(name(r#"sch"ema"#));
        resources.databases[0].grants[1].schema = Some(name(r#"sch"ema"#));
        bench.apply(&resources).await.unwrap_or_else(|error| panic!("{}", Chain(&error)));
        bench.credentials_log_in().await;
        assert_eq!(bench.apply(&resources).await.expect("second run").steps, 0);
        destroy(&bench.connect, &resources, &mut narrate).await.expect("destroy");
        assert_eq!(bench.count("SELECT count(*) FROM pg_roles WHERE rolname = 'stranger'").await, 1);
    })
    .await;
}

#[tokio::test]
async fn two_runs_take_turns() {
    Bench::each(async |bench| {
        let resources = bench.resources();
        let (one, two) = tokio::join!(bench.apply(&resources), bench.apply(&resources));
        let (one, two) = (one.expect("one"), two.expect("two"));
        assert!((one.steps == 0) != (two.steps == 0), "{one:?} {two:?}");
        bench.credentials_log_in().await;
    })
    .await;
}

/// The lock at the server counts in one database of one instance; the file has entries of several.
#[tokio::test]
async fn regression_shared_output_file_runs_on_several_instances_lose_no_password() {
    let bench = Bench::start(&bin_directories()[0], Who::Superuser).await;
    bench.server.run("postgres", &["CREATE DATABASE elsewhere"]).await;
    let set = |number: u16| {
        let mut resources = bench.resources();
        // To the lock and to the output, another database to log in to and another port are another instance.
        resources.instance.database = name(["postgres", "elsewhere"][usize::from(number % 2)]);
        resources.instance.target.port += number;
        resources.id = format!("set-{number}").parse().expect("id");
        resources.databases.clear();
        resources.roles = vec![Role { name: name(&format!("role-{number}")), member_of: Vec::new() }];
        resources
    };
    let sets = [set(0), set(1), set(2), set(3)];
    let [a, b, c, d] = &sets;
    let (a, b, c, d) = tokio::join!(bench.apply(a), bench.apply(b), bench.apply(c), bench.apply(d));
    for (number, run) in [a, b, c, d].into_iter().enumerate() {
        run.unwrap_or_else(|error| panic!("run {number}: {}", Chain(&error)));
    }
    for (number, resources) in sets.iter().enumerate() {
        let again = bench.apply(resources).await.unwrap_or_else(|error| panic!("set {number}: {}", Chain(&error)));
        assert_eq!(again.steps, 0, "set {number}");
    }
}

#[tokio::test]
async fn verifies_the_server_and_keeps_the_administrators_password_to_itself() {
    let bench = Bench::start(&bin_directories()[0], Who::Superuser).await;
    let other = Postgres::start("other.internal").await;
    let good = bench.resources();
    let with = |tls: Tls| {
        let mut resources = good.clone();
        resources.instance.tls = tls;
        resources
    };
    let ca_file = Some(bench.server.ca_file());
    for (tls, said) in [
        (Tls::VerifyFull { name: Some("other.internal".into()), ca_file: ca_file.clone() }, "NotValidForName"),
        (Tls::VerifyFull { name: None, ca_file: Some(other.ca_file()) }, "certificate"),
        (Tls::VerifyFull { name: None, ca_file: None }, "certificate"),
        (Tls::VerifyFull { name: None, ca_file: Some("/nowhere/ca.pem".into()) }, "/nowhere/ca.pem"),
        // The server takes passwords over TLS only; in clear it is not even asked.
        (Tls::Disable, "pg_hba"),
    ] {
        let error = bench.apply(&with(tls.clone())).await.expect_err("refused");
        let text = Chain(&error).to_string();
        assert!(text.contains(said) || text.contains("not valid for name"), "{tls:?}: {text}");
        assert!(!text.contains(SUPERUSER_PASSWORD) && !format!("{error:?}").contains(SUPERUSER_PASSWORD));
    }
    let mut wrong = good.clone();
    wrong.instance.password = Some(Secret::new("wrong-secret".into()));
    let error = bench.apply(&wrong).await.expect_err("refused");
    let text = format!("{} {error:?}", Chain(&error));
    assert!(text.contains("28P01") && !text.contains("wrong-secret"), "{text}");
    wrong.instance.password = None;
    let text = Chain(&bench.apply(&wrong).await.expect_err("refused")).to_string();
    assert!(text.contains("CAPONIER_DATABASE_PASSWORD"), "{text}");

    // A server without TLS: never in clear instead.
    bench.server.run("postgres", &["ALTER SYSTEM SET ssl = off", "SELECT pg_reload_conf()"]).await;
    let deadline = std::time::Instant::now() + crate::harness::PATIENCE;
    // A session begun after the server took its configuration anew shows it.
    while bench.count("SELECT count(*) FROM pg_settings WHERE name = 'ssl' AND setting = 'off'").await == 0 {
        assert!(std::time::Instant::now() < deadline, "the server does not reload");
    }
    let text = Chain(&bench.apply(&good).await.expect_err("refused")).to_string();
    assert!(text.contains("server does not support TLS"), "{text}");
    assert!(!bench.output().exists());
}

#[tokio::test]
async fn says_what_an_administrator_lacks() {
    for bin in bin_directories() {
        let bench = Bench::start(&bin, Who::Plain).await;
        let resources = bench.resources();
        bench.server.run("postgres", &["ALTER ROLE provisioner NOCREATEDB NOCREATEROLE"]).await;
        let text = bench.apply(&resources).await.expect_err("refused").to_string();
        assert!(text.contains("CREATEROLE") && text.contains("CREATEDB"), "{text}");
        bench.server.run("postgres", &["ALTER ROLE provisioner CREATEDB CREATEROLE"]).await;
        // Not trusted: only a superuser can make it. Everything before it was done, and is completed.
        let mut greedy = resources.clone();
        greedy.databases[0].extensions.push(Extension { name: name("dblink"), schema: None, version: None });
        let text = Chain(&bench.apply(&greedy).await.expect_err("refused")).to_string();
        assert!(text.contains("not a trusted one") && text.contains("42501"), "{text}");
        bench.server.run("orders", &["CREATE EXTENSION dblink SCHEMA public"]).await;
        bench.apply(&greedy).await.expect("now");
        bench.credentials_log_in().await;
        // A foreign session in the database cannot be ended by a plain administrator.
        let session = bench.server.superuser("orders").await;
        let text = Chain(&destroy(&bench.connect, &greedy, &mut narrate).await.expect_err("refused")).to_string();
        assert!(text.contains("sessions of other roles"), "{text}");
        drop(session);
        destroy(&bench.connect, &greedy, &mut narrate).await.expect("destroy");
    }
}
