//! Going away in order: what runs goes on, what is new goes elsewhere, and nothing falls between the two.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use caponier::task::Tasks;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{
    ACTIVATE, Program, Side, Site, assert_balanced, caponier, connect, echo, echoes, eventually, free_port,
    read_to_end, run, within,
};

/// One connection that carries bytes there and back.
async fn try_echo(address: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"anew").await?;
    let mut back = [0; 4];
    stream.read_exact(&mut back).await?;
    assert_eq!(&back, b"anew");
    Ok(())
}

/// Ends a stream and waits for the other end to do so.
async fn end(mut stream: TcpStream) {
    stream.shutdown().await.expect("an end");
    assert_eq!(read_to_end(stream).await, b"");
}

fn counts(record: &Value) -> &Value {
    &record["counts"]
}

#[tokio::test]
async fn a_gateway_waits_for_the_forward_that_runs_and_takes_on_nothing_new() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).drain(Side::Gateway, 300).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).says("draining: 1 forward(s) still run, ").await;
    for address in [site.doors[0], site.address] {
        let refused = eventually("nobody listens", async || TcpStream::connect(address).await.err()).await;
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    let began = site.record(Side::Gateway, json!({"event": "drain.began"})).await;
    assert_eq!(counts(&began), &json!({"forwards": 1, "links": 1}));
    echoes(&mut stream, b"goes on").await;
    // The admin socket answers meanwhile.
    let agents = run(caponier().arg("agents").arg("--json").arg("--socket").arg(site.admin_socket())).await.done();
    let agents: Value = serde_json::from_str(&agents).expect("JSON");
    assert_eq!((&agents[0]["state"], &agents[0]["live"]), (&json!("draining"), &json!(1)));
    assert!(!site.program(Side::Gateway).has_ended());
    end(stream).await;
    assert_eq!(site.program(Side::Gateway).ended().await.code(), Some(0));
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "eof"})).await;
    let ended = site.record(Side::Gateway, json!({"event": "drain.ended"})).await;
    assert_eq!(counts(&ended), &json!({"ended": 1, "cut": 0}));
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "drained"})).await;
    assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
    assert!(!site.admin_socket().exists());
    // For the agent that was no fault of anybody's.
    site.record(Side::Agent, json!({"event": "link.down", "reason": "closed"})).await;
    let log = site.program(Side::Agent).log();
    assert!(log.contains("its gateway wants it made anew") && !log.contains("the link is lost"), "{log}");
    site.restart_gateway().await;
    site.program(Side::Gateway).says(" linked ").await;
    echoes(connect(site.doors[0]).await, b"linked again").await;
    site.stop().await;
}

#[tokio::test]
async fn what_a_gateway_still_runs_at_the_deadline_or_the_second_signal_is_cut() {
    let target = echo().await;
    for (seconds, again, reason) in [(1, false, "drained"), (300, true, "gateway_stopped")] {
        let mut site = Site::plan().allow(target).door(target).drain(Side::Gateway, seconds).start().await;
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"running").await;
        let gateway = site.program(Side::Gateway);
        gateway.signal("TERM");
        gateway.says("draining: 1 forward(s) still run, ").await;
        if again {
            gateway.signal("INT");
        }
        assert_eq!(gateway.ended().await.code(), Some(1), "{reason}");
        assert_eq!(read_to_end(&mut stream).await, b"");
        site.record(Side::Gateway, json!({"event": "forward.ended", "reason": reason, "to_target": 7})).await;
        let ended = site.record(Side::Gateway, json!({"event": "drain.ended"})).await;
        assert_eq!(counts(&ended), &json!({"ended": 0, "cut": 1}));
        assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
        let other = site.record(Side::Agent, json!({"event": "forward.ended", "to_target": 7})).await;
        assert_eq!(other["reason"] == "gateway_drained", !again, "{other}");
        assert_eq!(site.program(Side::Agent).stop().await, Some(0));
        assert_balanced(Side::Agent, &site.trail(Side::Agent));
    }
}

#[tokio::test]
async fn an_agent_waits_for_the_forward_that_runs_and_gets_nothing_new() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).drain(Side::Agent, 300).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    site.program(Side::Agent).signal("TERM");
    site.program(Side::Agent).says("draining: 1 forward(s) still run, ").await;
    site.program(Side::Gateway).says("the agent drains").await;
    assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"", "nobody is left to serve it");
    echoes(&mut stream, b"goes on").await;
    let began = site.record(Side::Agent, json!({"event": "drain.began"})).await;
    assert_eq!(counts(&began), &json!({"forwards": 1, "links": 1}));
    end(stream).await;
    assert_eq!(site.program(Side::Agent).ended().await.code(), Some(0));
    let ended = site.record(Side::Agent, json!({"event": "drain.ended"})).await;
    assert_eq!(counts(&ended), &json!({"ended": 1, "cut": 0}));
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "eof"})).await;
    site.record(Side::Gateway, json!({"event": "link.down", "reason": "agent_drained"})).await;
    assert_balanced(Side::Agent, &site.trail(Side::Agent));
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
}

#[tokio::test]
async fn what_an_agent_still_runs_at_the_deadline_or_the_second_signal_is_cut() {
    let target = echo().await;
    for (seconds, again, reason) in [(1, false, "drained"), (300, true, "agent_stopped")] {
        let mut site = Site::plan().allow(target).door(target).drain(Side::Agent, seconds).start().await;
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"running").await;
        let agent = site.program(Side::Agent);
        agent.signal("TERM");
        agent.says("draining: 1 forward(s) still run, ").await;
        if again {
            agent.signal("TERM");
        }
        assert_eq!(agent.ended().await.code(), Some(1), "{reason}");
        assert_eq!(read_to_end(&mut stream).await, b"");
        site.record(Side::Agent, json!({"event": "forward.ended", "reason": reason, "to_target": 7})).await;
        assert_balanced(Side::Agent, &site.trail(Side::Agent));
        let other = site.record(Side::Gateway, json!({"event": "forward.ended", "to_target": 7})).await;
        assert_eq!(other["reason"] == "agent_drained", !again, "{other}");
        assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
        assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
    }
}

#[tokio::test]
async fn sessions_of_stock_ssh_end_with_their_last_forward_and_get_no_new_one() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).drain(Side::Gateway, 300).start().await;
    let (mut idle, _) = site.local_forward(target).await;
    let (mut busy, address) = site.local_forward(target).await;
    let mut stream = connect(address).await;
    echoes(&mut stream, b"before").await;
    site.program(Side::Gateway).signal("TERM");
    assert_eq!(idle.ended().await.code(), Some(255));
    assert!(idle.log().contains("the gateway goes away"), "{}", idle.log());
    assert_eq!(read_to_end(connect(address).await).await, b"");
    busy.says("open failed: connect failed: not available").await;
    site.record(Side::Gateway, json!({"event": "forward.denied", "reason": "draining", "door": "ssh"})).await;
    assert_eq!(site.records(Side::Agent, &json!({"event": "forward.denied"})), Vec::<Value>::new());
    echoes(&mut stream, b"goes on").await;
    end(stream).await;
    assert_eq!(busy.ended().await.code(), Some(255));
    assert_eq!(site.program(Side::Gateway).ended().await.code(), Some(0));
    assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
}

/// Connects again and again to an address, until it is told to stop; all must come back.
struct Load {
    done: Arc<AtomicUsize>,
    failed: Arc<std::sync::Mutex<Vec<String>>>,
    tasks: Tasks,
}

impl Load {
    fn start(addresses: &[SocketAddr], clients: usize) -> Self {
        let load = Self { done: Arc::default(), failed: Arc::default(), tasks: Tasks::new() };
        for at in 0..clients {
            let address = addresses[at % addresses.len()];
            let (done, failed, stop) = (load.done.clone(), load.failed.clone(), load.tasks.stopping().clone());
            load.tasks.spawn(async move {
                while !stop.is_cancelled() {
                    match try_echo(address).await {
                        Ok(()) => drop(done.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => failed.lock().expect("unpoisoned").push(format!("{address}: {error}")),
                    }
                }
            });
        }
        load
    }

    /// Waits for so many more connections than there have been.
    async fn more(&self, number: usize) {
        let wanted = self.done.load(Ordering::Relaxed) + number;
        eventually("more connections", async || (self.done.load(Ordering::Relaxed) >= wanted).then_some(())).await;
    }

    async fn stop(self) {
        assert!(self.tasks.drain(crate::harness::PATIENCE).await);
        let failed = self.failed.lock().expect("unpoisoned").clone();
        assert_eq!(failed, Vec::<String>::new(), "of {} others", self.done.load(Ordering::Relaxed));
    }
}

#[tokio::test]
async fn a_gateway_is_replaced_three_times_without_a_connection_that_fails() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target).drain(Side::Gateway, 300).socket_activation();
    let mut site = plan.start().await;
    let port = free_port();
    let mut command = caponier();
    command.args(["forward", "--agent", crate::harness::AGENT, "-L", &format!("{port}:{target}")]);
    command.arg("--gateway").arg(format!("ssh://{}", site.address)).arg("--identity").arg(site.key("provisioner"));
    command.arg("--known-hosts").arg(site.path().join("known_hosts")).env("CAPONIER_LOG", "caponier=debug");
    let mut forward = site.background("forward", command);
    forward.says("listening 127.").await;
    let load = Load::start(&[site.doors[0], SocketAddr::from(([127, 0, 0, 1], port))], 4);
    let mut trail = "gateway.jsonl".to_owned();
    for _ in 0..3 {
        load.more(20).await;
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"through the old one").await;
        let (mut before, next) = site.succeed_gateway().await;
        before.signal("TERM");
        site.program(Side::Gateway).says(" linked ").await;
        load.more(20).await;
        echoes(&mut stream, b"still there").await;
        end(stream).await;
        assert_eq!(before.ended().await.code(), Some(0), "{}", before.log());
        assert_balanced(Side::Gateway, &site.trail_in(&trail));
        // The path is the new one's: the old one has left it alone.
        let agents = run(caponier().arg("agents").arg("--json").arg("--socket").arg(site.admin_socket())).await.done();
        assert!(agents.contains("\"active\""), "{agents}");
        trail = next;
    }
    load.more(20).await;
    load.stop().await;
    forward.signal("TERM");
    assert_eq!(forward.ended().await.code(), Some(0));
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    assert_balanced(Side::Agent, &site.trail(Side::Agent));
}

#[tokio::test]
async fn a_gateway_with_listeners_of_its_own_starts_while_the_one_before_drains() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).drain(Side::Gateway, 300).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    // While it serves, nobody takes its place.
    let config = site.config(Side::Gateway);
    let second =
        run(caponier().arg("gateway").arg("--config").arg(&config).env("CAPONIER_AUDIT__FILE", "x.jsonl")).await;
    assert_eq!(second.code(), 1);
    assert!(second.stderr.contains("another gateway answers there"), "{}", second.stderr);
    site.program(Side::Gateway).signal("TERM");
    site.program(Side::Gateway).says("draining: 1 forward(s) still run, ").await;
    // The ports are free.
    let text = std::fs::read_to_string(&config).expect("a configuration");
    let text = text.replacen("127.0.0.1:0", &site.address.to_string(), 1);
    let text = text.replacen("127.0.0.1:0", &site.doors[0].to_string(), 1);
    std::fs::write(&config, text).expect("written");
    let (mut before, _) = site.succeed_gateway().await;
    site.program(Side::Gateway).says(" linked ").await;
    echoes(connect(site.doors[0]).await, b"the new one").await;
    echoes(&mut stream, b"the old one").await;
    end(stream).await;
    assert_eq!(before.ended().await.code(), Some(0));
    assert!(site.admin_socket().exists(), "the new one's admin socket is gone");
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    assert!(!site.admin_socket().exists());
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
}

#[tokio::test]
async fn the_service_manager_is_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("notify");
    let heard = UnixDatagram::bind(&path).expect("a socket");
    heard.set_nonblocking(true).expect("nonblocking");
    let next = async |what: &str| {
        eventually(&format!("a datagram with {what}"), async || {
            let mut buffer = [0; 1024];
            let length = heard.recv(&mut buffer).ok()?;
            let text = String::from_utf8(buffer[..length].to_vec()).expect("text");
            text.lines().any(|line| line.starts_with(what)).then_some(text)
        })
        .await
    };
    let target = echo().await;
    let path = path.to_str().expect("a path");
    let plan = Site::plan().allow(target).door(target).drain(Side::Gateway, 300);
    let plan = plan.gateway_variable("NOTIFY_SOCKET", path).gateway_variable("WATCHDOG_USEC", "300000");
    let mut site = plan.start().await;
    let ready = next("READY=1").await;
    assert_eq!(ready, format!("READY=1\nSTATUS=listening on {}", site.address));
    for _ in 0..3 {
        assert_eq!(next("WATCHDOG=1").await, "WATCHDOG=1");
    }
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"running").await;
    site.program(Side::Gateway).signal("TERM");
    let stopping = next("STOPPING=1").await;
    assert!(
        stopping.contains("\nSTATUS=draining: 1 forward(s), ") && stopping.contains("\nEXTEND_TIMEOUT_USEC=3"),
        "{stopping}"
    );
    // Draining is no reason to be taken for dead.
    for _ in 0..3 {
        next("WATCHDOG=1").await;
    }
    end(stream).await;
    assert_eq!(site.program(Side::Gateway).ended().await.code(), Some(0));

    site.change_agent("", &[("NOTIFY_SOCKET", path), ("WATCHDOG_USEC", "300000")]);
    assert_eq!(site.program(Side::Agent).stop().await, Some(0));
    while heard.recv(&mut [0; 1024]).is_ok() {}
    site.restart_agent().await;
    next("READY=1").await;
    next("WATCHDOG=1").await;
    site.program(Side::Agent).signal("TERM");
    next("STOPPING=1").await;
    assert_eq!(site.program(Side::Agent).ended().await.code(), Some(0));
}

#[tokio::test]
async fn inherited_sockets_that_are_not_its_own_keep_a_gateway_from_starting() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let dir = tempfile::tempdir().expect("a folder");
    let other = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").expect("a listener"));
    let unknown = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let words = format!("listens on {}", unknown.local_addr().expect("its address"));
    let connected = std::net::TcpStream::connect(site.address).expect("connected");
    for (socket, words) in [
        (OwnedFd::from(UdpSocket::bind("127.0.0.1:0").expect("a socket")), "is not a TCP listener"),
        (OwnedFd::from(UnixListener::bind(dir.path().join("x")).expect("a listener")), "is not a TCP listener"),
        (OwnedFd::from(std::fs::File::open("/dev/null").expect("a file")), "is not a TCP listener"),
        (OwnedFd::from(connected), "it does not listen"),
        (OwnedFd::from(unknown), words.as_str()),
    ] {
        let mut command = tokio::process::Command::new("python3");
        command.args(["-c", ACTIVATE, "1", env!("CARGO_BIN_EXE_caponier"), "gateway", "--config"]);
        command.arg(site.config(Side::Gateway)).env("CAPONIER_AUDIT__FILE", "other.jsonl");
        command.env("CAPONIER_GATEWAY__ADMIN_SOCKET", dir.path().join("admin.sock"));
        let mut gateway =
            Program::start_with_sockets("gateway", command, &site.path().join("inherits.log"), [socket, other()]);
        let code = within("its end", gateway.ended()).await.code();
        assert_eq!(code, Some(2), "{words}: {}", gateway.log());
        assert!(gateway.log().contains(words), "{words}: {}", gateway.log());
    }
    site.stop().await;
}

#[tokio::test]
async fn a_client_waits_for_a_gateway_that_is_being_started_again() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let port = free_port();
    let mut command = caponier();
    command.args(["forward", "--agent", crate::harness::AGENT, "-L", &format!("{port}:{target}")]);
    command.arg("--gateway").arg(format!("ssh://{}", site.address)).arg("--identity").arg(site.key("provisioner"));
    command.arg("--known-hosts").arg(site.path().join("known_hosts"));
    let mut forward = site.background("forward", command);
    forward.says("listening 127.").await;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    echoes(connect(address).await, b"first").await;
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    let tasks = Tasks::new();
    let waiting = tasks.spawn(try_echo(address));
    forward.says("logging in again").await;
    site.restart_gateway().await;
    site.program(Side::Gateway).says(" linked ").await;
    // It may have come in before the agent had linked.
    if within("an answer", waiting).await.expect("no panic").is_err() {
        eventually("a connection", async || try_echo(address).await.ok()).await;
    }
    forward.signal("TERM");
    assert_eq!(forward.ended().await.code(), Some(0));
    site.stop().await;
}
