//! DNS games: an agent that asks a server of the test's, which lies, changes its mind, or says nothing.
//!
//! The world: on one port of several addresses of loopback there are places that each say which one it is, and count who came.
//! The rule permits names, and of their addresses only 127.0.0.1 and 127.0.0.3.

mod server;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use caponier::limits;
use caponier::task::Tasks;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::harness::{PATIENCE, Said, Side, Site, eventually, free_port, run};
use server::{A, AAAA, Dns, NOERROR, NXDOMAIN, REFUSED, Record, Reply, SERVFAIL, SRV, local};

/// Places that say who they are.
struct Places {
    port: u16,
    visits: Vec<(u8, Arc<AtomicUsize>)>,
    _tasks: Tasks,
}

impl Places {
    async fn at(lasts: &[u8]) -> Self {
        let tasks = Tasks::new();
        // On each address the same, and on those that a test puts something else on: one that the system gives nobody there.
        let (port, mut visits) = (free_port(), Vec::new());
        for &last in lasts {
            let listener = TcpListener::bind((local(last), port)).await.expect("the same port on each address");
            let count = Arc::<AtomicUsize>::default();
            visits.push((last, count.clone()));
            tasks.spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    count.fetch_add(1, Ordering::SeqCst);
                    drop(stream.write_all(format!("{}\n", local(last)).as_bytes()).await);
                }
            });
        }
        Self { port, visits, _tasks: tasks }
    }

    /// How often somebody came to the place.
    fn visits(&self, last: u8) -> usize {
        self.visits.iter().find(|(of, _)| *of == last).expect("a place").1.load(Ordering::SeqCst)
    }
}

/// An agent that asks `servers`, and may reach these names on the places' port.
async fn site(servers: &[&Dns], settings: &str, port: u16, hosts: &[&str]) -> Site {
    let servers: Vec<_> = servers.iter().map(|dns| dns.address.to_string()).collect();
    Site::plan()
        .agent_setting(&format!("[agent.resolver]\nservers = {servers:?}\n{settings}"))
        .rule(&format!(
            "name = \"games\"\nhosts = {hosts:?}\nwithin = [\"127.0.0.1/32\", \"127.0.0.3/32\"]\nports = [{port}]\n"
        ))
        .start()
        .await
}

/// What a stranger at the SSH door sees of a forward, and what the agent recorded at its end.
async fn ask(site: &Site, name: &str, port: u16) -> (Said, Value) {
    let target = format!("{name}:{port}");
    let normal = format!("{}:{port}", name.trim_end_matches('.').to_lowercase());
    let ended = || {
        let mut records = site.records(Side::Agent, &json!({"target": normal}));
        records.retain(|record| record["event"] != "forward.open");
        records
    };
    let before = ended().len();
    let said = run(&mut site.ssh(&["-W", &target])).await;
    let what = format!("the end of a forward to {target}");
    let record = eventually(&what, async || ended().into_iter().nth(before)).await;
    (said, record)
}

/// The forward led to this place.
fn led_to((said, record): &(Said, Value), last: u8, port: u16) {
    assert_eq!(said.stdout, format!("{}\n", local(last)), "{said:?} {record}");
    assert_eq!(record["event"], "forward.ended", "{record}");
    assert_eq!(record["dialled"], SocketAddr::from((local(last), port)).to_string(), "{record}");
}

/// The forward was refused; the stranger reads one of the fixed texts, the agent's trail has the reason.
fn refused((said, record): &(Said, Value), event: &str, reason: &str, detail: &str) {
    let public = if event == "forward.denied" { "not allowed" } else { "not available" };
    assert!(said.stdout.is_empty(), "{said:?}");
    assert!(said.stderr.contains(&format!(": {public}\r\n")), "{said:?}");
    assert!(detail.is_empty() || !said.stderr.contains(detail), "{said:?}");
    assert_eq!((&record["event"], &record["reason"]), (&json!(event), &json!(reason)), "{record}");
    assert!(record["detail"].as_str().unwrap_or_default().contains(detail), "{detail:?} in {record}");
}

#[tokio::test]
async fn what_was_checked_is_dialled_however_often_the_answer_changes() {
    let (dns, places) = (Dns::start().await, Places::at(&[1, 2, 3]).await);
    let site = site(&[&dns], "family = \"ipv4\"", places.port, &["db.internal"]).await;
    // Checked while it leads to one place; from the next question on it leads to another.
    let answers = [1, 2, 3, 2].map(|last| Reply::Records(vec![Record::address(&local(last).to_string(), 0)]));
    dns.say("db.internal", A, &answers);
    led_to(&ask(&site, "db.internal", places.port).await, 1, places.port);
    assert_eq!(dns.asked("db.internal", A), 1, "one lookup for a forward");
    refused(&ask(&site, "db.internal", places.port).await, "forward.denied", "outside_within", "127.0.0.2");
    led_to(&ask(&site, "DB.Internal.", places.port).await, 3, places.port);
    assert_eq!(dns.asked("db.internal", A), 3, "what lives for no time is not kept");
    assert_eq!((places.visits(1), places.visits(2), places.visits(3)), (1, 0, 1));
    site.stop().await;
}

#[tokio::test]
async fn of_several_addresses_only_permitted_ones_are_dialled_and_the_others_are_on_record() {
    let (dns, places) = (Dns::start().await, Places::at(&[1, 2, 3]).await);
    let hosts = ["mixed.internal", "embeds.internal", "mapped.internal", "only-ipv6.internal"];
    let site = site(&[&dns], "", places.port, &hosts).await;
    dns.has("mixed.internal", &["127.0.0.2", "169.254.169.254", "127.0.0.3", "2001:db8::1"], 0);
    let mixed = ask(&site, "mixed.internal", places.port).await;
    led_to(&mixed, 3, places.port);
    let mut others: Vec<_> = mixed.1["refused"].as_array().expect("addresses").iter().map(|one| one.as_str()).collect();
    others.sort_unstable();
    assert_eq!(others, [Some("127.0.0.2"), Some("169.254.169.254"), Some("2001:db8::1")]);
    assert_eq!(mixed.1["resolved"].as_array().expect("addresses").len(), 4);

    // Spellings of an IPv4 address in IPv6: the mapped form is that address, the others are what they are.
    dns.has("mapped.internal", &["::ffff:169.254.169.254", "::ffff:127.0.0.1"], 0);
    let mapped = ask(&site, "mapped.internal", places.port).await;
    led_to(&mapped, 1, places.port);
    assert_eq!(mapped.1["refused"], json!(["169.254.169.254"]));
    for address in ["64:ff9b::a9fe:a9fe", "::a9fe:a9fe", "2002:a9fe:a9fe::1", "::ffff:a9fe:a9fe", "64:ff9b::127.0.0.1"]
    {
        dns.has("embeds.internal", &[address], 0);
        refused(&ask(&site, "embeds.internal", places.port).await, "forward.denied", "outside_within", "");
    }
    assert_eq!((places.visits(1), places.visits(2), places.visits(3)), (1, 0, 1));
    site.stop().await;
}

#[tokio::test]
async fn a_wide_network_permits_no_metadata_service_in_any_spelling() {
    let dns = Dns::start().await;
    let site = Site::plan()
        .agent_setting(&format!("[agent.resolver]\nservers = [\"{}\"]\n", dns.address))
        .rule("name = \"wide\"\nhosts = [\"db.internal\"]\nwithin = [\"0.0.0.0/0\", \"::/0\"]\nports = [80]\n")
        .start()
        .await;
    for address in
        ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "fd00:ec2::254"]
    {
        dns.has("db.internal", &[address], 0);
        refused(&ask(&site, "db.internal", 80).await, "forward.denied", "reserved_address", "");
    }
    site.stop().await;
}

#[tokio::test]
async fn aliases_count_for_where_they_lead_and_not_for_their_names() {
    let (dns, places) = (Dns::start().await, Places::at(&[1, 2]).await);
    let hosts =
        ["alias.internal", "asks-on.internal", "away.internal", "circle.internal", "chain.internal", "mixed.internal"];
    let site = site(&[&dns], "family = \"ipv4\"", places.port, &hosts).await;
    let here = |last| Record::address(&local(last).to_string(), 0);
    // To a name that no rule has, but within: the name that was asked for counts, and the address.
    let alias = Record::alias("forbidden.internal", 0);
    dns.say("alias.internal", A, &[Reply::Records(vec![alias.clone(), here(1).of("forbidden.internal")])]);
    led_to(&ask(&site, "alias.internal", places.port).await, 1, places.port);
    refused(&ask(&site, "forbidden.internal", places.port).await, "forward.denied", "no_rule", "");
    // A server that leaves it to us to ask on.
    dns.say("asks-on.internal", A, &[Reply::Records(vec![Record::alias("elsewhere.internal", 0)])]);
    dns.has("elsewhere.internal", &["127.0.0.1"], 0);
    led_to(&ask(&site, "asks-on.internal", places.port).await, 1, places.port);
    assert_eq!(dns.asked("elsewhere.internal", A), 1);
    // Away from the network.
    dns.say("away.internal", A, &[Reply::Records(vec![alias, here(2).of("forbidden.internal")])]);
    refused(&ask(&site, "away.internal", places.port).await, "forward.denied", "outside_within", "127.0.0.2");
    // Round and round, in one answer and over several; and on and on.
    let there = Record::alias("there.internal", 0);
    let back = Record::alias("circle.internal", 0);
    let circles = [vec![there.clone(), back.clone().of("there.internal")], vec![there]];
    for circle in circles {
        dns.say("circle.internal", A, &[Reply::Records(circle)]);
        dns.say("there.internal", A, &[Reply::Records(vec![back.clone()])]);
        refused(
            &ask(&site, "circle.internal", places.port).await,
            "forward.failed",
            "unresolved",
            "aliases in a circle",
        );
    }
    let link = |at: usize| Record::alias(&format!("l{}.internal", at + 1), 0).of(&format!("l{at}.internal"));
    let mut chain = vec![Record::alias("l0.internal", 0)];
    chain.extend((0..500).map(link));
    chain.push(here(1).of("l500.internal"));
    dns.say("chain.internal", A, &[Reply::OverTcp(chain)]);
    refused(&ask(&site, "chain.internal", places.port).await, "forward.failed", "unresolved", "more than 16 aliases");
    assert!(dns.asked("there.internal", A) + dns.asked("circle.internal", A) <= limits::ALIASES_MAX + 2);
    assert_eq!((places.visits(1), places.visits(2)), (2, 0));
    site.stop().await;
}

#[tokio::test]
async fn an_answer_that_is_of_no_use_is_a_failure_with_its_name() {
    let (dns, places) = (Dns::start().await, Places::at(&[1, 2]).await);
    let hosts = ["db.internal", "good.internal"];
    let site = site(&[&dns], "family = \"ipv4\"\ntimeout_s = 2", places.port, &hosts).await;
    let here = |last| Record::address(&local(last).to_string(), 0);
    let late = "no answer within 2 s";
    for (case, reply, detail) in [
        ("no such name", Reply::Nothing(NXDOMAIN, Some(0)), "there is no such name"),
        ("no address", Reply::Nothing(NOERROR, Some(0)), "it exists, but has no address"),
        ("nothing at all", Reply::Nothing(NOERROR, None), "it exists, but has no address"),
        ("a server that fails", Reply::Nothing(SERVFAIL, None), "it answered Server Failure"),
        ("a server that refuses", Reply::Nothing(REFUSED, None), "it answered Query Refused"),
        ("silence", Reply::Silence, late),
        ("another number", Reply::WrongId(vec![here(1)]), late),
        ("another question", Reply::WrongQuestion(vec![here(1)]), late),
        ("another name", Reply::Records(vec![here(1).of("good.internal")]), "has no address"),
        ("another type", Reply::Records(vec![Record::address("2001:db8::1", 0)]), "has no address"),
        ("too much, and then nothing", Reply::Broken, ""),
    ] {
        dns.say("db.internal", A, &[reply]);
        let started = Instant::now();
        let outcome = ask(&site, "db.internal", places.port).await;
        assert!(started.elapsed() < limits::OPEN_TIMEOUT, "{case}: {:?}", started.elapsed());
        refused(&outcome, "forward.failed", "unresolved", detail);
    }
    // Beside records for another name, its own count.
    let among = vec![here(2).of("good.internal"), here(1), here(2).of("db.internal.evil.com")];
    dns.say("db.internal", A, &[Reply::Records(among)]);
    let outcome = ask(&site, "db.internal", places.port).await;
    led_to(&outcome, 1, places.port);
    assert_eq!(outcome.1["resolved"], json!(["127.0.0.1"]));
    // Forged answers come first and are passed over.
    dns.say("db.internal", A, &[Reply::ForgedThen(vec![here(2)], vec![here(1)])]);
    led_to(&ask(&site, "db.internal", places.port).await, 1, places.port);
    assert_eq!(places.visits(2), 0);
    site.stop().await;
}

#[tokio::test]
async fn names_that_nobody_answers_hold_up_nobody_else() {
    let (dns, places) = (Dns::start().await, Places::at(&[1]).await);
    let site =
        site(&[&dns], "family = \"ipv4\"\ntimeout_s = 10", places.port, &["slow.internal", "good.internal"]).await;
    dns.say("slow.internal", A, &[Reply::Silence]);
    dns.has("good.internal", &["127.0.0.1"], 0);
    let port = places.port;
    let started = Instant::now();
    let slow = async {
        let outcome = ask(&site, "slow.internal", port).await;
        (outcome, started.elapsed())
    };
    let good = async {
        eventually("a question about the slow name", async || (dns.asked("slow.internal", A) > 0).then_some(())).await;
        led_to(&ask(&site, "good.internal", port).await, 1, port);
        started.elapsed()
    };
    let ((outcome, slow), good) = tokio::join!(slow, good);
    refused(&outcome, "forward.failed", "unresolved", "no answer within 10 s");
    assert!(good < slow, "{good:?} {slow:?}");
    site.stop().await;
}

#[tokio::test]
async fn thousand_addresses_come_over_tcp_and_are_cut_to_the_bound() {
    let (dns, places) = (Dns::start().await, Places::at(&[1]).await);
    let site = site(&[&dns], "family = \"ipv4\"", places.port, &["many.internal"]).await;
    let mut many = vec![Record::address("127.0.0.1", 0)];
    many.extend((0..1_000).map(|at| Record::address(&format!("10.9.{}.{}", at / 250, at % 250), 0)));
    dns.say("many.internal", A, &[Reply::OverTcp(many)]);
    let outcome = ask(&site, "many.internal", places.port).await;
    led_to(&outcome, 1, places.port);
    assert_eq!(outcome.1["resolved"].as_array().expect("addresses").len(), limits::ADDRESSES_PER_NAME);
    assert_eq!(outcome.1["refused"].as_array().expect("addresses").len(), limits::ADDRESSES_PER_NAME - 1);
    site.stop().await;
}

#[tokio::test]
async fn what_is_kept_is_judged_anew_and_not_longer_than_it_lives() {
    let (dns, places) = (Dns::start().await, Places::at(&[1, 2]).await);
    let hosts = ["kept.internal", "brief.internal", "absent.internal", "capped.internal"];
    let mut site = site(&[&dns], "family = \"ipv4\"\ncache_ttl_max_s = 30", places.port, &hosts).await;
    dns.has("kept.internal", &["127.0.0.1"], 30);
    for _ in 0..3 {
        led_to(&ask(&site, "kept.internal", places.port).await, 1, places.port);
    }
    assert_eq!(dns.asked("kept.internal", A), 1, "asked once, and kept");
    // That there is nothing is kept for as long as the zone says; and not at all where it says nothing.
    dns.say("absent.internal", A, &[Reply::Nothing(NXDOMAIN, Some(20))]);
    dns.say("capped.internal", A, &[Reply::Nothing(NXDOMAIN, None)]);
    for name in ["absent.internal", "capped.internal"] {
        for _ in 0..2 {
            refused(&ask(&site, name, places.port).await, "forward.failed", "unresolved", "no such name");
        }
    }
    assert_eq!((dns.asked("absent.internal", A), dns.asked("capped.internal", A)), (1, 2));

    // Rebinding: once its time is over, the name leads elsewhere, and that is judged.
    let brief = [1, 2].map(|last| Reply::Records(vec![Record::address(&local(last).to_string(), 2)]));
    dns.say("brief.internal", A, &brief);
    led_to(&ask(&site, "brief.internal", places.port).await, 1, places.port);
    let until = Instant::now() + PATIENCE;
    let last = loop {
        let outcome = ask(&site, "brief.internal", places.port).await;
        if outcome.1["event"] == "forward.denied" || Instant::now() > until {
            break outcome;
        }
    };
    refused(&last, "forward.denied", "outside_within", "127.0.0.2");
    assert_eq!(places.visits(2), 0);

    // What is known does not speak against the configuration, which may have changed.
    change_agent(&mut site, "127.0.0.1/32", "127.0.0.9/32").await;
    refused(&ask(&site, "kept.internal", places.port).await, "forward.denied", "outside_within", "127.0.0.1");
    assert_eq!(dns.asked("kept.internal", A), 1, "still from the cache");
    site.stop().await;
}

#[tokio::test]
async fn another_resolver_takes_effect_with_the_next_forward_and_knows_nothing_yet() {
    let (dns, other, places) = (Dns::start().await, Dns::start().await, Places::at(&[1, 3]).await);
    let mut site = site(&[&dns], "family = \"ipv4\"", places.port, &["db.internal"]).await;
    dns.has("db.internal", &["127.0.0.1"], 3_600);
    other.has("db.internal", &["127.0.0.3"], 3_600);
    led_to(&ask(&site, "db.internal", places.port).await, 1, places.port);
    change_agent(&mut site, &dns.address.to_string(), &other.address.to_string()).await;
    led_to(&ask(&site, "db.internal", places.port).await, 3, places.port);
    let reloaded = site.record(Side::Agent, json!({"event": "config.reloaded"})).await;
    assert_eq!(reloaded["detail"], "changed: resolver", "{reloaded}");
    assert_eq!((dns.asked("db.internal", A), other.asked("db.internal", A)), (1, 1));
    site.stop().await;
}

#[tokio::test]
async fn a_server_that_fails_or_is_silent_makes_room_for_the_next() {
    let (silent, failing, good, places) =
        (Dns::start().await, Dns::start().await, Dns::start().await, Places::at(&[1]).await);
    let servers = [&silent, &failing, &good];
    let site = site(&servers, "family = \"ipv4\"", places.port, &["db.internal", "gone.internal"]).await;
    silent.say("db.internal", A, &[Reply::Silence]);
    failing.say("db.internal", A, &[Reply::Nothing(SERVFAIL, None)]);
    good.has("db.internal", &["127.0.0.1"], 0);
    led_to(&ask(&site, "db.internal", places.port).await, 1, places.port);
    // What the first one says of a name that is not there is not asked for again.
    good.has("gone.internal", &["127.0.0.1"], 0);
    refused(&ask(&site, "gone.internal", places.port).await, "forward.failed", "unresolved", "no such name");
    assert_eq!(good.asked("gone.internal", A), 0);
    site.stop().await;
}

#[tokio::test]
async fn families_are_asked_for_as_they_are_wanted() {
    let (dns, places) = (Dns::start().await, Places::at(&[1]).await);
    let site = site(&[&dns], "family = \"any\"", places.port, &["half.internal", "both.internal"]).await;
    // A server that never answers for one family holds a forward up for a moment only.
    dns.say("half.internal", A, &[Reply::Records(vec![Record::address("127.0.0.1", 0)])]);
    dns.say("half.internal", AAAA, &[Reply::Silence]);
    led_to(&ask(&site, "half.internal", places.port).await, 1, places.port);
    dns.has("both.internal", &["127.0.0.1", "127.0.0.2", "2001:db8::1", "2001:db8::2"], 0);
    let outcome = ask(&site, "both.internal", places.port).await;
    led_to(&outcome, 1, places.port);
    assert_eq!(outcome.1["resolved"], json!(["2001:db8::1", "127.0.0.1", "2001:db8::2", "127.0.0.2"]));
    site.stop().await;
}

#[tokio::test]
async fn an_address_that_is_asked_for_is_meant_whatever_family_names_are_to_have() {
    let (dns, places) = (Dns::start().await, Places::at(&[1]).await);
    let settings = format!("[agent.resolver]\nservers = [\"{}\"]\nfamily = \"ipv6\"\n", dns.address);
    let site = Site::plan().agent_setting(&settings).allow((local(1), places.port).into()).start().await;
    led_to(&ask(&site, "127.0.0.1", places.port).await, 1, places.port);
    site.stop().await;
}

#[tokio::test]
async fn a_service_leads_only_to_permitted_ports_and_addresses() {
    let (dns, places) = (Dns::start().await, Places::at(&[1, 2, 3]).await);
    let port = places.port;
    let elsewhere = Places::at(&[1]).await;
    let site = Site::plan()
        .agent_setting(&format!("[agent.resolver]\nservers = [\"{}\"]\nfamily = \"ipv4\"\n", dns.address))
        .rule(&format!(
            "name = \"service\"\nservices = [\"_pg._tcp.internal\"]\n\
             within = [\"127.0.0.1/32\", \"127.0.0.3/32\"]\nports = [{port}]\n"
        ))
        .start()
        .await;
    for last in [1, 2, 3] {
        dns.has(&format!("host{last}.internal"), &[&local(last).to_string()], 0);
    }
    dns.has("metadata.internal", &["169.254.169.254"], 0);
    let say = |instances: &[Record]| dns.say("_pg._tcp.internal", SRV, &[Reply::Records(instances.to_vec())]);
    let ask = async || ask(&site, "_pg._tcp.internal", port).await;
    let instance = |priority, port, host: &str| Record::service(priority, 0, port, host);

    // The first in order that is permitted; what is not is on record, with its port.
    say(&[
        instance(40, port, "host3.internal"),
        instance(30, port, "host1.internal"),
        instance(20, elsewhere.port, "host1.internal"),
        instance(10, port, "host2.internal"),
        instance(5, port, "gone.internal"),
        instance(1, port, "metadata.internal"),
    ]);
    let led = ask().await;
    led_to(&led, 1, port);
    let refusals = ["169.254.169.254", "127.0.0.2"].map(|address| format!("{address}:{port}"));
    let refusals = [&refusals[..], &[format!("127.0.0.1:{}", elsewhere.port)]].concat();
    assert_eq!(led.1["refused"], json!(refusals));
    assert_eq!(led.1["resolved"].as_array().expect("instances").len(), 5);
    // Each wrong thing alone.
    for (instances, event, reason, detail) in [
        (vec![instance(0, elsewhere.port, "host1.internal")], "forward.denied", "port", "it leads to port"),
        (vec![instance(0, port, "host2.internal")], "forward.denied", "outside_within", "127.0.0.2"),
        (vec![instance(0, port, "metadata.internal")], "forward.denied", "outside_within", "169.254.169.254"),
        (
            vec![instance(0, port, "gone.internal")],
            "forward.failed",
            "unresolved",
            "gone.internal: there is no such name",
        ),
        (vec![instance(0, port, ".")], "forward.failed", "unresolved", "no instance of the service"),
        (vec![instance(0, 0, "host1.internal")], "forward.failed", "unresolved", "no instance of the service"),
        (vec![instance(0, port, "127.0.0.1")], "forward.failed", "unresolved", "no instance of the service"),
        (vec![Record::address("127.0.0.1", 0)], "forward.failed", "unresolved", "no instance of the service"),
    ] {
        say(&instances);
        refused(&ask().await, event, reason, detail);
    }
    // The host is a host's name, and a service that is asked for as a host is none.
    refused(&self::ask(&site, "host1.internal", port).await, "forward.denied", "no_rule", "");
    assert_eq!((places.visits(1), places.visits(2), places.visits(3), elsewhere.visits(1)), (1, 0, 0, 0));
    site.stop().await;
}

/// The agent's gateway is a place that no rule opens, however wide, and whatever a record leads to.
#[tokio::test]
async fn a_service_or_a_name_that_leads_to_the_agents_own_gateway_is_refused() {
    let (dns, places) = (Dns::start().await, Places::at(&[1]).await);
    let all = "within = [\"127.0.0.0/8\", \"::1/128\", \"64:ff9b::/96\", \"2002:7f00::/24\"]\nports = [\"1-65535\"]\n";
    let site = Site::plan()
        .agent_setting(&format!("[agent.resolver]\nservers = [\"{}\"]\n", dns.address))
        .rule(&format!("name = \"service\"\nservices = [\"_pg._tcp.internal\"]\n{all}"))
        .rule(&format!("name = \"names\"\nhosts = [\"**.internal\"]\n{all}"))
        .start()
        .await;
    let (gateway, port) = (site.address.port(), places.port);
    dns.has("here.internal", &["127.0.0.1"], 0);
    dns.has("translated.internal", &["64:ff9b::7f00:1"], 0);
    dns.has("relayed.internal", &["2002:7f00:1::1"], 0);
    let say = |instances: &[(u16, &str)]| {
        let records = instances.iter().zip(0..).map(|((port, host), at)| Record::service(at, 0, *port, host)).collect();
        dns.say("_pg._tcp.internal", SRV, &[Reply::Records(records)]);
    };
    for host in ["here.internal", "translated.internal", "relayed.internal"] {
        say(&[(gateway, host)]);
        // Whichever port is asked for, the record's is dialled.
        for asked in [port, gateway] {
            let outcome = ask(&site, "_pg._tcp.internal", asked).await;
            refused(&outcome, "forward.denied", "own_gateway", "which no rule can open");
        }
        refused(&ask(&site, host, gateway).await, "forward.denied", "own_gateway", "which no rule can open");
    }
    let seen = site.records(Side::Gateway, &json!({"event": "auth.refused"}));
    assert_eq!(seen, Vec::<Value>::new(), "nobody came to the gateway by these ways");
    // Beside it, the next instance serves; and the gateway's host has other ports.
    say(&[(gateway, "here.internal"), (port, "here.internal")]);
    let led = ask(&site, "_pg._tcp.internal", port).await;
    led_to(&led, 1, port);
    assert_eq!(led.1["refused"], json!([format!("127.0.0.1:{gateway}")]));
    led_to(&ask(&site, "here.internal", port).await, 1, port);
    site.stop().await;
}

#[tokio::test]
async fn an_address_that_is_silent_makes_room_for_the_next_and_one_that_answers_late_is_left() {
    let (dns, places) = (Dns::start().await, Places::at(&[3]).await);
    // A listener whose queue is full does not answer.
    let silent = TcpSocket::new_v4().expect("a socket");
    silent.bind((local(1), places.port).into()).expect("bound");
    let silent = silent.listen(0).expect("a listener");
    let mut waiting = Vec::new();
    while let Ok(connected) =
        tokio::time::timeout(limits::CONNECT_STAGGER, TcpStream::connect(silent.local_addr().expect("its address")))
            .await
    {
        waiting.push(connected.expect("connected"));
    }
    let site = site(&[&dns], "family = \"ipv4\"", places.port, &["db.internal"]).await;
    dns.has("db.internal", &["127.0.0.1", "127.0.0.3"], 0);
    let outcome = ask(&site, "db.internal", places.port).await;
    led_to(&outcome, 3, places.port);
    // By the record, because ssh and this test take their time too.
    let took = outcome.1["duration_ms"].as_u64().map(Duration::from_millis);
    assert!(took.is_some_and(|took| took < limits::CONNECT_TIMEOUT), "{took:?}");
    site.stop().await;
}

/// Replaces a text in the agent's configuration, and has it read again.
async fn change_agent(site: &mut Site, from: &str, to: &str) {
    let path = site.config(Side::Agent);
    let before = std::fs::read_to_string(&path).expect("a configuration");
    assert!(before.contains(from), "{before}");
    std::fs::write(&path, before.replace(from, to)).expect("written");
    site.program(Side::Agent).signal("HUP");
    site.record(Side::Agent, json!({"event": "config.reloaded"})).await;
}
