//! Whether programs say truly how they are: at ports, sockets, files, and by `caponier health`.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::{
    PATIENCE, Program, Said, Side, Site, caponier, connect, echo, echoes, eventually, read_to_end, run, run_for, within,
};
use crate::lifecycle::Pipe;

/// Where a program says that it answers about health.
async fn place(program: &mut Program) -> SocketAddr {
    let line = program.says("health on ").await;
    let (_, address) = line.split_once("health on ").expect("an address");
    address.split_whitespace().next().expect("an address").parse().expect("an address")
}

/// The status, and the report.
async fn ready(place: SocketAddr) -> (u16, Value) {
    let mut stream = connect(place).await;
    stream.write_all(b"GET /readyz?verbose HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("written");
    let said = String::from_utf8(read_to_end(stream).await).expect("text");
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{said:?}"));
    (head[9..12].parse().expect("a status"), serde_json::from_str(body).unwrap_or_else(|_| panic!("{said}")))
}

/// The part of this name.
pub(crate) fn part<'a>(report: &'a Value, name: &str) -> &'a Value {
    let parts = report["parts"].as_array().expect("parts");
    parts.iter().find(|part| part["part"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
}

/// Waits until a part is in order, or not.
pub(crate) async fn becomes(place: SocketAddr, name: &str, good: bool) -> Value {
    let what = format!("{name} becomes {good}");
    eventually(&what, async || {
        let (status, report) = ready(place).await;
        (part(&report, name)["ready"] == good).then(|| {
            assert_eq!(status == 200, report["ready"] == true, "{report}");
            assert!(good || status == 503, "{report}");
            report
        })
    })
    .await
}

async fn health(arguments: &[&str]) -> Said {
    run(caponier().arg("health").args(arguments)).await
}

/// The TCP sockets at which a program listens, and its Unix sockets with a path.
async fn listens(pid: u32) -> String {
    let told = run(tokio::process::Command::new("ss").args(["-H", "-l", "-t", "-u", "-x", "-p"])).await.done();
    told.lines().filter(|line| line.contains(&format!("pid={pid},"))).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn an_agent_is_ready_while_each_organisation_has_a_link_and_says_which_has_none() {
    let target = echo().await;
    let plan = Site::plan()
        .allow(target)
        .door(target)
        .agent_setting("[health]\nlisten = \"127.0.0.1:0\"\nsocket = \"h.sock\"\nfile = \"h.json\"");
    let mut site = plan.start().await;
    let place = place(site.program(Side::Agent)).await;
    let report = becomes(place, "links", true).await;
    assert_eq!(part(&report, "links")["organisation"], "acme");
    assert_eq!((&report["side"], &report["live"]), (&json!("agent"), &json!(true)));
    let [socket, file] = ["h.sock", "h.json"].map(|name| site.path().join(name).display().to_string());
    let config = site.config(Side::Agent).display().to_string();
    let url = format!("http://{place}");
    let ways: [&[&str]; 4] = [&["--config", &config], &["--socket", &socket], &["--file", &file], &["--url", &url]];
    for way in ways {
        let said = eventually("a health that is asked for", async || {
            let said = health(way).await;
            (said.code() == 0).then_some(said)
        })
        .await;
        assert!(said.stdout.starts_with("agent: ready\n"), "{said:?}");
        let live = health(&[way, &["--live"]].concat()).await;
        assert_eq!((live.code(), live.stdout.as_str()), (0, "live\n"));
    }
    for path in [&socket, &file] {
        assert_eq!(fs::metadata(path).expect("there").permissions().mode() & 0o777, 0o600, "{path}");
    }

    // It is gone in order, and it says since when.
    site.program(Side::Gateway).kill().await;
    let report = becomes(place, "links", false).await;
    let links = part(&report, "links");
    assert!(
        links["since"].is_string() && links["detail"].as_str().expect("a text").starts_with("no usable link"),
        "{links}"
    );
    assert!(!report.to_string().contains(&site.address.to_string()), "no address is told: {report}");
    for way in ways {
        let said = eventually("a health that says no", async || {
            let said = health(way).await;
            (said.code() == 1).then_some(said)
        })
        .await;
        for told in ["agent: not ready\n", "NOT OK  links acme, for ", "no usable link", "what to do: "] {
            assert!(said.stdout.contains(told), "{told}: {said:?}");
        }
        assert_eq!(health(&[way, &["--live"]].concat()).await.code(), 0, "it lives all the same");
    }
    let json: Value = serde_json::from_str(&health(&["--socket", &socket, "--json"]).await.stdout).expect("JSON");
    assert_eq!(part(&json, "links")["organisation"], "acme");

    site.restart_gateway().await;
    becomes(place, "links", true).await;
    site.program(Side::Agent).stop().await;
    for path in [&socket, &file] {
        assert!(!fs::exists(path).expect("looked"), "{path} is left");
    }
    assert_eq!(health(&["--file", &file]).await.code(), 1);
    assert_eq!(health(&["--socket", &socket]).await.code(), 1);
    site.stop().await;
}

#[tokio::test]
async fn a_tunnel_that_dies_without_a_word_is_noticed_within_forty_five_seconds() {
    let plan = Site::plan().agent_setting("[health]\nlisten = \"127.0.0.1:0\"");
    let mut site = plan.start().await;
    let place = place(site.program(Side::Agent)).await;
    becomes(place, "links", true).await;
    // Its system acknowledges all, and it says nothing more.
    site.program(Side::Gateway).signal("STOP");
    let silent = jiff::Timestamp::now();
    let report = becomes(place, "links", false).await;
    // By the record's own time: how soon this test gets to see it is another matter on a busy machine.
    let down = site.record(Side::Agent, json!({"event": "link.down"})).await;
    let noticed: jiff::Timestamp = down["time"].as_str().expect("a time").parse().expect("a time");
    let took = noticed.duration_since(silent).unsigned_abs();
    assert!(took < Duration::from_secs(45), "{took:?}: {report}");
    assert_eq!(part(&report, "links")["organisation"], "acme");
    site.program(Side::Gateway).signal("CONT");
    becomes(place, "links", true).await;
    site.stop().await;
}

#[tokio::test]
async fn without_being_told_an_agent_listens_on_nothing() {
    let mut site = Site::plan().start().await;
    let agent = site.program(Side::Agent).pid();
    let told = listens(agent).await;
    assert_eq!(told, "", "an agent listens");
    let gateway = site.program(Side::Gateway).pid();
    let told = listens(gateway).await;
    assert!(told.contains(&site.address.to_string()) && told.contains("admin.sock"), "ss shows what there is: {told}");
    let config = site.config(Side::Agent).display().to_string();
    let said = health(&["--config", &config]).await;
    assert_eq!(said.code(), 2);
    assert!(said.stderr.contains("opens nothing that could be asked") && said.stderr.contains("[health]"), "{said:?}");
    site.stop().await;
}

#[tokio::test]
async fn a_gateway_tells_of_its_parts_and_not_of_its_agents() {
    let plan = Site::plan()
        .gateway_setting("[health]\nlisten = \"127.0.0.1:0\"\n[metrics]\nlisten = \"127.0.0.1:0\"")
        .drain(Side::Gateway, 60);
    let mut site = plan.start_gateway().await;
    let place = {
        let gateway = site.program(Side::Gateway);
        let line = gateway.says("INFO").await;
        assert!(!line.is_empty());
        // The one of [metrics] answers, too.
        place(gateway).await
    };
    let (status, report) = ready(place).await;
    assert_eq!((status, &report["side"]), (200, &json!("gateway")), "{report}");
    for name in ["threads", "listeners", "registry", "trail", "drain"] {
        assert_eq!(part(&report, name)["ready"], true, "{report}");
    }
    let socket = site.admin_socket().display().to_string();
    assert!(health(&["--socket", &socket]).await.stdout.starts_with("gateway: ready\n"));
    let config = site.config(Side::Gateway).display().to_string();
    assert_eq!(health(&["--config", &config, "--live"]).await.code(), 0);
    // What is wrong with the newest registry is told, and the last good one goes on.
    fs::write(site.registry().folder("acme/agents/prod-eu/broken.pub"), "nonsense").expect("written");
    let report = eventually("the registry's faults", async || {
        let (_, report) = ready(place).await;
        part(&report, "registry")["detail"].is_string().then_some(report)
    })
    .await;
    assert_eq!((&report["ready"], &part(&report, "registry")["ready"]), (&json!(true), &json!(true)));
    fs::remove_file(site.registry().folder("acme/agents/prod-eu/broken.pub")).expect("removed");
    eventually("a registry in order", async || {
        part(&ready(place).await.1, "registry")["detail"].is_null().then_some(())
    })
    .await;
    site.stop().await;
}

#[tokio::test]
async fn who_drains_is_not_ready_and_lives() {
    let target = echo().await;
    let plan = Site::plan()
        .allow(target)
        .door(target)
        .drain(Side::Gateway, 60)
        .gateway_setting("[health]\nlisten = \"127.0.0.1:0\"");
    let mut site = plan.start().await;
    let place = place(site.program(Side::Gateway)).await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"here").await;
    site.program(Side::Gateway).signal("TERM");
    let report = becomes(place, "drain", false).await;
    assert!(report["live"] == true && part(&report, "drain")["since"].is_string(), "{report}");
    let said = health(&["--socket", &site.admin_socket().display().to_string()]).await;
    assert!(said.code() == 1 && said.stdout.contains("NOT OK  drain, for "), "{said:?}");
    drop(stream);
    site.program(Side::Gateway).ended().await;
    site.stop_agent().await;
}

#[tokio::test]
async fn whoever_dawdles_at_the_health_port_disturbs_neither_probes_nor_forwards() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target).agent_setting("[health]\nlisten = \"127.0.0.1:0\"");
    let mut site = plan.start().await;
    let place = place(site.program(Side::Agent)).await;
    becomes(place, "links", true).await;
    let mut stream = connect(site.doors[0]).await;
    let descriptors = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count();
    let agent = site.program(Side::Agent).pid();
    let before = descriptors(agent);
    let mut dawdlers = Vec::new();
    for number in 0..1_000 {
        let mut dawdler = within("a connection", TcpStream::connect(place)).await.expect("connected");
        let said: &[u8] = match number % 3 {
            0 => b"",
            1 => b"GET /readyz HTTP/1.1\r\nX: ",
            _ => &[b'A'; 16 * 1024],
        };
        drop(dawdler.write_all(said).await);
        dawdlers.push(dawdler);
        if number % 250 == 0 {
            assert_eq!(ready(place).await.0, 200);
            echoes(&mut stream, b"still here").await;
        }
    }
    assert_eq!(ready(place).await.0, 200);
    assert!(descriptors(agent) < before + 40, "{} descriptors, {before} before", descriptors(agent));
    echoes(&mut stream, &[7; 100_000]).await;
    drop((stream, dawdlers));
    site.stop().await;
}

#[tokio::test]
async fn who_cannot_record_is_not_ready() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target).trail_to_pipe(Side::Gateway);
    let mut pipe = Pipe::open(plan.path());
    let mut site = plan.gateway_setting("[health]\nlisten = \"127.0.0.1:0\"").start_gateway().await;
    let place = place(site.program(Side::Gateway)).await;
    becomes(place, "trail", true).await;
    pipe.read();
    drop(pipe);
    // What is not written down is not noticed.
    drop(connect(site.doors[0]).await);
    let report = becomes(place, "trail", false).await;
    assert!(part(&report, "trail")["detail"].as_str().expect("a text").contains("nothing opens"), "{report}");
    assert!(part(&report, "trail")["since"].is_string() && report["live"] == true, "{report}");
    let said = health(&["--socket", &site.admin_socket().display().to_string()]).await;
    assert!(said.code() == 1 && said.stdout.contains("NOT OK  trail, for "), "{said:?}");
    let _pipe = Pipe::open(site.path());
    becomes(place, "trail", true).await;
    site.stop().await;
}

#[tokio::test]
async fn what_is_asked_wrongly_is_a_usage_error() {
    for wrong in [
        &["--url", "https://127.0.0.1:1"][..],
        &["--url", "nonsense"],
        &["--file", "a", "--socket", "b"],
        &["--config", "/nonexistent/file"],
        &["extra"],
    ] {
        let said = health(wrong).await;
        assert_eq!(said.code(), 2, "{wrong:?}: {said:?}");
    }
    let said = run_for(PATIENCE, caponier().args(["health", "--socket", "/nonexistent/socket"])).await;
    assert!(said.code() == 1 && said.stderr.contains("is it running"), "{said:?}");
}

#[tokio::test]
async fn another_place_for_health_takes_a_restart() {
    let mut site = Site::plan().start_gateway().await;
    let config = site.config(Side::Gateway);
    let text = fs::read_to_string(&config).expect("a configuration");
    fs::write(&config, format!("{text}\n[health]\nlisten = \"127.0.0.1:0\"\n[metrics]\nlisten = \"127.0.0.1:0\"\n"))
        .expect("written");
    site.program(Side::Gateway).says("need a restart: health, metrics").await;
    site.stop().await;
}
