//! What whoever watches a site gets to see: metrics, traces and the log. All of it tells what happens, and none of it to whom.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::harness::{
    AGENT, PATIENCE, Plan, Program, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen,
    read_to_end, within,
};
use crate::network_proxy::place::{Place, ask};

/// Where a program serves its metrics.
pub(crate) async fn metrics_of(program: &mut Program) -> SocketAddr {
    let line = program.says("metrics and health on ").await;
    let (_, rest) = line.split_once("metrics and health on ").expect("an address");
    rest.split_whitespace().next().expect("an address").parse().expect("an address")
}

/// A page of metrics, in the older text format.
pub(crate) async fn scrape(from: SocketAddr) -> String {
    let reply = ask(&mut connect(from).await, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body.to_owned()
}

/// The series of a page, by name and labels.
fn series(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let parsed = lines.map(|line| {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}")))
    });
    parsed.collect()
}

/// Waits until a series has at least this value; the page with it.
async fn reaches(from: SocketAddr, name: &str, value: f64) -> BTreeMap<String, f64> {
    let mut last = String::new();
    let looked = async {
        eventually(name, async || {
            last = scrape(from).await;
            let found = series(&last);
            found.get(name).is_some_and(|now| *now >= value).then_some(found)
        })
        .await
    };
    match tokio::time::timeout(PATIENCE, looked).await {
        Ok(found) => found,
        Err(_) => panic!("{name} is not {value} in {last}"),
    }
}

/// The real promtool has nothing to say about a page.
async fn lint(page: &str) {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.kill_on_drop(true).spawn().expect("promtool");
    let mut input = child.stdin.take().expect("its input");
    input.write_all(page.as_bytes()).await.expect("written");
    drop(input);
    let said = within("promtool", child.wait_with_output()).await.expect("its output");
    let text = [said.stdout, said.stderr].concat();
    assert!(said.status.success() && text.is_empty(), "{}\n{page}", String::from_utf8_lossy(&text));
}

fn assert_names_nobody(text: &str, what: &str) {
    for word in ["provisioner", "127.0.0.1", "localhost", "secret.internal"] {
        assert!(!text.contains(word), "{what} names {word}: {text}");
    }
}

/// The values of all labels of a page.
fn labels(page: &str) -> String {
    let quoted = page.lines().filter(|line| !line.starts_with('#')).flat_map(|line| line.split('"').skip(1).step_by(2));
    quoted.collect::<Vec<_>>().join("\n")
}

fn with_variable(mut plan: Plan, name: &str, value: &str) -> Plan {
    plan = plan.gateway_variable(name, value);
    plan.agent_variable(name, value)
}

/// What comes to a gateway and is none of what it is for.
async fn intrude(site: &Site) {
    let mut stream = connect(site.address).await;
    drop(stream.write_all(b"CONNECT secret.internal:5432 HTTP/1.1\r\nHost: secret.internal\r\n\r\n").await);
    drop(read_to_end(stream).await);
}

#[tokio::test]
async fn metrics_say_what_happens_and_to_nobody() {
    let target = echo().await;
    let elsewhere = format!("127.0.0.1:{}", free_port());
    let plan = Site::plan().allow(target).door(target).door(elsewhere);
    let mut site = with_variable(plan, "CAPONIER_METRICS__LISTEN", "127.0.0.1:0").start().await;
    let gateway = metrics_of(site.program(Side::Gateway)).await;
    let agent = metrics_of(site.program(Side::Agent)).await;

    let up = reaches(gateway, "caponier_agent_links{organisation=\"acme\",agent=\"prod-eu\"}", 1.0).await;
    assert_eq!(up["caponier_links{state=\"active\"}"], 1.0);
    assert_eq!(up["caponier_agents{state=\"linked\"}"], 1.0);
    assert_eq!(up["caponier_forwards"], 0.0);
    reaches(agent, "caponier_organisation_links{organisation=\"acme\"}", 1.0).await;

    // While a forward runs, its bytes show.
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, &[7; 100_000]).await;
    for side in [gateway, agent] {
        let running = reaches(side, "caponier_forward_bytes_total{direction=\"from_target\"}", 100_000.0).await;
        assert_eq!(running["caponier_forwards"], 1.0);
        assert_eq!(running["caponier_forward_open_seconds_count"], 1.0);
    }
    drop(stream);
    drop(read_to_end(connect(site.doors[1]).await).await);
    intrude(&site).await;

    let ended = "caponier_forwards_finished_total{outcome=\"ended\",door=\"local\"}";
    let seen = reaches(gateway, ended, 1.0).await;
    assert!(seen["caponier_audit_records_total{event=\"forward.open\"}"] >= 1.0);
    reaches(gateway, "caponier_auth_failures_total{reason=\"token_missing\"}", 1.0).await;
    reaches(gateway, "caponier_forwards_finished_total{outcome=\"denied\",door=\"local\"}", 1.0).await;
    let seen = reaches(agent, "caponier_forwards_finished_total{outcome=\"ended\",door=\"link\"}", 1.0).await;
    assert_eq!(seen["caponier_link_dials_total{outcome=\"linked\"}"], 1.0);
    assert!(seen.iter().any(|(name, count)| name.starts_with("caponier_denials_total{") && *count == 1.0), "{seen:?}");

    let mut proxy = Place::new();
    proxy.write(
        "",
        &format!(
            "[metrics]\nlisten = \"127.0.0.1:0\"\n[[upstream]]\nname = \"control\"\nto = \"{target}\"\n\
             [[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"connect\"\nupstreams = [\"control\"]\n"
        ),
    );
    proxy.start(1).await;
    let of_proxy = metrics_of(proxy.program()).await;
    let mut stream = connect(proxy.listeners[0]).await;
    let denied = ask(&mut stream, "CONNECT secret.internal:1 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(denied.starts_with("HTTP/1.1 403 "), "{denied}");
    reaches(of_proxy, "caponier_forwards_finished_total{outcome=\"denied\",door=\"connect\"}", 1.0).await;

    for from in [gateway, agent, of_proxy] {
        let page = scrape(from).await;
        lint(&page).await;
        assert_names_nobody(&labels(&page), "a label");
        for name in
            ["caponier_build_info", "process_open_fds", "process_cpu_seconds_total", "caponier_audit_queue_records"]
        {
            assert!(series(&page).keys().any(|series| series.starts_with(name)), "{name}: {page}");
        }
    }
    proxy.stop().await;
    site.stop().await;
}

#[tokio::test]
async fn alerts_are_tested_and_each_says_what_to_do() {
    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");
    for arguments in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]] {
        let mut promtool = Command::new("promtool");
        crate::harness::run(promtool.args(arguments).current_dir(deploy)).await.done();
    }
    let read = |file: &str| std::fs::read_to_string(format!("{deploy}/{file}")).expect(file);
    let (alerts, tests, readme) = (read("alerts.yml"), read("alerts.test.yml"), read("../README.md"));
    let names: Vec<_> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let anchor = name.to_lowercase();
        assert!(alerts.contains(&format!("runbook: README.md#{anchor}\n")), "{name} names no line of README.md");
        assert!(readme.contains(&format!("<a id=\"{anchor}\"></a>")), "README.md does not say what to do about {name}");
        assert!(tests.contains(&format!("alertname=\"{name}\"")), "{name} is not tested");
    }
}

/// A collector that keeps what it gets.
async fn collector() -> (SocketAddr, Arc<Mutex<Vec<Value>>>) {
    let got: Arc<Mutex<Vec<Value>>> = Arc::default();
    let kept = got.clone();
    let address = listen(move |mut stream| {
        let kept = kept.clone();
        async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { return };
                head.push(byte);
            }
            let head = String::from_utf8(head).expect("a head").to_lowercase();
            assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
            let mut body = vec![0; length.parse().expect("a length")];
            stream.read_exact(&mut body).await.expect("a body");
            kept.lock().expect("no panic").push(serde_json::from_slice(&body).expect("JSON"));
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await);
        }
    })
    .await;
    (address, got)
}

fn spans(got: &Mutex<Vec<Value>>) -> Vec<Value> {
    let got = got.lock().expect("no panic");
    let of_message =
        |message: &Value| message["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().expect("spans").clone();
    got.iter().flat_map(of_message).collect()
}

#[tokio::test]
async fn traces_show_a_forward_on_both_sides_as_one() {
    let (collector, got) = collector().await;
    let target = echo().await;
    let elsewhere = format!("127.0.0.1:{}", free_port());
    let plan = Site::plan().allow(target).door(target).door(elsewhere);
    let site = with_variable(plan, "CAPONIER_TRACES__OTLP", &format!("http://{collector}")).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"hello").await;
    drop(stream);
    drop(read_to_end(connect(site.doors[1]).await).await);
    let all = eventually("the spans of two forwards on both sides", async || {
        let all = spans(&got);
        (all.iter().filter(|span| span["name"] == "forward").count() >= 4).then_some(all)
    })
    .await;
    let attribute = |span: &Value, key: &str| {
        let attributes = span["attributes"].as_array().cloned().unwrap_or_default();
        attributes.iter().find(|one| one["key"] == key).map_or(Value::Null, |one| one["value"]["stringValue"].clone())
    };
    let opened = site.record(Side::Gateway, json!({"event": "forward.ended"})).await;
    let roots: Vec<_> = all.iter().filter(|span| span["name"] == "forward").collect();
    let ours =
        roots.iter().find(|span| attribute(span, "caponier.forward") == opened["forward"]).expect("the gateway's");
    assert_eq!(attribute(ours, "caponier.outcome"), "ended");
    assert_eq!(attribute(ours, "caponier.organisation"), "acme");
    let theirs = roots.iter().find(|span| span["parentSpanId"] == ours["spanId"]).expect("the agent's");
    assert_eq!(theirs["traceId"], ours["traceId"]);
    for root in [ours, theirs] {
        let below = |span: &&Value| span["parentSpanId"] == root["spanId"] && span["name"] != "forward";
        let names: Vec<_> = all.iter().filter(below).map(|span| span["name"].as_str().expect("a name")).collect();
        assert_eq!(names, ["decide", "open", "splice"]);
    }
    let denied = roots.iter().filter(|span| attribute(span, "caponier.outcome") == "denied").count();
    assert_eq!(denied, 2, "{roots:?}");
    assert_names_nobody(&serde_json::to_string(&all).expect("text"), "a span");
    site.stop().await;
}

#[tokio::test]
async fn a_collector_that_is_away_costs_nothing_but_traces() {
    let target = echo().await;
    let plan = with_variable(Site::plan().allow(target).door(target), "CAPONIER_METRICS__LISTEN", "127.0.0.1:0");
    let away = format!("http://127.0.0.1:{}", free_port());
    let mut site = with_variable(plan, "CAPONIER_TRACES__OTLP", &away).start().await;
    let gateway = metrics_of(site.program(Side::Gateway)).await;
    for _ in 0..3 {
        echoes(connect(site.doors[0]).await, b"hello").await;
    }
    reaches(gateway, "caponier_traces_total{outcome=\"lost\"}", 3.0).await;
    site.program(Side::Gateway).says("traces do not get to the collector").await;
    site.stop().await;
}

#[tokio::test]
async fn the_log_holds_no_principal_client_target_or_secret() {
    let target = echo().await;
    let elsewhere = format!("127.0.0.1:{}", free_port());
    let plan = Site::plan().allow(target).door(target).door(elsewhere);
    let mut site = plan.start().await;
    // Once more, with a log for machines, at the places that are known now.
    site.restart_gateway().await;
    let mut programs = Vec::new();
    for side in [Side::Gateway, Side::Agent] {
        assert_eq!(site.program(side).stop().await, Some(0));
        let mut command = caponier();
        command.arg(side.name()).arg("--config").arg(site.config(side));
        command.env("CAPONIER_LOG", "info").env("CAPONIER_LOG__FORMAT", "json");
        programs.push(Program::start(side.name(), command, &site.path().join(format!("{}.json", side.name()))));
    }
    eventually("another link", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() >= 2
            && programs[0].log().contains("\"linked\""))
        .then_some(())
    })
    .await;
    // As it should be, denied, by a key that nobody knows, by what is no SSH and by a token that is none.
    echoes(connect(site.doors[0]).await, b"hello").await;
    drop(read_to_end(connect(site.doors[1]).await).await);
    intrude(&site).await;
    let stranger = site.key("stranger");
    for key in ["stranger", "provisioner"] {
        let tried = site.ssh_as(key, AGENT, &["-W", "secret.internal:5432"]);
        let mut tried = tried;
        crate::harness::run(&mut tried).await;
    }
    let mut stream = connect(site.address).await;
    let proxied = "CONNECT secret.internal:5432 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic Y2Fwb25pZXI6dG9rZW4tb2Ytbm9ib2R5\r\n\r\n";
    drop(stream.write_all(proxied.as_bytes()).await);
    drop(read_to_end(stream).await);
    site.record(Side::Gateway, json!({"event": "auth.refused"})).await;
    site.record(Side::Gateway, json!({"event": "forward.ended"})).await;
    let key = std::fs::read_to_string(stranger).expect("a key");
    let secret = key.lines().nth(1).expect("its text").to_owned();
    for program in &mut programs {
        assert_eq!(program.stop().await, Some(0));
        let log = program.log();
        assert!(log.lines().count() >= 4, "{log}");
        for line in log.lines() {
            let entry: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            for member in ["timestamp", "level"] {
                assert!(entry[member].is_string(), "{line}");
            }
            for word in ["provisioner", "secret.internal", "token-of-nobody", "Y2Fwb25", "stranger", &secret] {
                assert!(!line.contains(word), "a line of the log holds {word}: {line}");
            }
            // Where it listens and what it dials are its own; clients and targets are not.
            for port in [target.port(), site.doors[0].port()] {
                let told = entry["fields"]["message"].as_str().is_some_and(|message| message.contains("door on"));
                assert!(told || !line.contains(&format!(":{port}")), "{line}");
            }
        }
    }
}

#[tokio::test]
async fn a_collector_is_named_by_an_address_in_clear() {
    let place = Place::new();
    for (url, fault) in [
        ("https://127.0.0.1:4318", "http://HOST:PORT"),
        ("127.0.0.1:4318", "http://HOST:PORT"),
        ("http://127.0.0.1", "http://HOST:PORT"),
        ("http://x:4318/v1/traces", "http://HOST:PORT"),
    ] {
        place.write(
            "",
            &format!(
                "[traces]\notlp = \"{url}\"\n[[upstream]]\nname = \"control\"\nto = \"127.0.0.1:9\"\n\
                 [[listener]]\naddress = \"127.0.0.1:0\"\nmode = \"connect\"\nupstreams = [\"control\"]\n"
            ),
        );
        let said = crate::harness::run(caponier().arg("check").arg(place.config())).await;
        assert!(said.code() == 2 && said.stderr.contains(fault), "{url}: {said:?}");
    }
}

/// What the dashboard asks, for everything there is.
fn questions() -> Vec<String> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/grafana-caponier.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file).expect("a dashboard")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    let asked = targets.map(|target| target["expr"].as_str().expect("a query").to_owned());
    asked.map(|text| text.replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "20s")).collect()
}

fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[tokio::test]
async fn the_dashboard_gets_answers_from_a_real_prometheus() {
    let target = echo().await;
    let elsewhere = format!("127.0.0.1:{}", free_port());
    let plan = Site::plan().allow(target).door(target).door(elsewhere);
    plan.registry().about_key("acme/agents/prod-eu", "one", "expires = 2099-01-01T00:00:00Z\n");
    let mut site = with_variable(plan, "CAPONIER_METRICS__LISTEN", "127.0.0.1:0").start().await;
    let mut watched = Vec::new();
    for side in [Side::Gateway, Side::Agent] {
        watched.push(metrics_of(site.program(side)).await);
    }
    let port = free_port();
    let list: Vec<_> = watched.iter().map(|address| format!("\"{address}\"")).collect();
    let config = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n- {{job_name: caponier, static_configs: [{{targets: [{}]}}]}}\n",
        list.join(", ")
    );
    let file = site.path().join("prometheus.yml");
    std::fs::write(&file, config).expect("written");
    let mut command = Command::new("prometheus");
    command.arg(format!("--config.file={}", file.display()));
    command.arg(format!("--storage.tsdb.path={}", site.path().join("tsdb").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
    let _prometheus = Program::start("prometheus", command, &site.path().join("prometheus.log"));
    let prometheus = SocketAddr::from(([127, 0, 0, 1], port));
    let query = async |text: &str| -> Value {
        let request =
            format!("GET /api/v1/query?query={} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", escaped(text));
        let reply = ask(&mut connect(prometheus).await, &request).await;
        // It says 503 until it has read what it holds.
        let (Some(start), Some(end)) = (reply.find('{'), reply.rfind('}')) else { return json!({"status": reply}) };
        serde_json::from_str(&reply[start..=end]).unwrap_or_else(|_| json!({"status": reply}))
    };
    // What the site has none of, and what only others do.
    let absent = ["certificate_expiry", "registry_rejected", "_sink_", "reconnects", "link_downs", "audit_write"];
    // Again and again, since what has not happened twice has no rate.
    for question in questions() {
        eventually(&format!("an answer to {question}"), async || {
            echoes(connect(site.doors[0]).await, b"hello").await;
            drop(read_to_end(connect(site.doors[1]).await).await);
            intrude(&site).await;
            let answer = query(&question).await;
            if answer["status"] == "error" {
                panic!("{question}: {answer}");
            }
            let found = answer["data"]["result"].as_array().is_some_and(|result| !result.is_empty());
            let excused = answer["status"] == "success" && absent.iter().any(|word| question.contains(word));
            (found || excused).then_some(())
        })
        .await;
    }
    site.stop().await;
}
