//! Operators, peers and clocks at their worst, around links that restart, drain, reload and are many.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use caponier::limits;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::{Instant, sleep};

use crate::harness::{
    AGENT, PATIENCE, Program, Side, Site, assert_balanced, caponier, connect, echo, echoes, eventually, free_port,
    listen, read_to_end, within,
};

/// How much longer than its deadline a drain may take: what a stop waits for its tasks, and a busy machine.
const SLACK: Duration = Duration::from_secs(60);

/// A target that sends without an end.
async fn flood() -> SocketAddr {
    listen(async |mut stream| {
        let chunk = [b'x'; 65_536];
        while stream.write_all(&chunk).await.is_ok() {}
    })
    .await
}

/// `caponier forward` to a target; where it listens.
async fn forward(site: &Site, target: SocketAddr) -> (Program, SocketAddr) {
    let port = free_port();
    let mut forward = caponier();
    forward.args(["forward", "--gateway", &format!("ssh://{}", site.address), "--agent", AGENT]);
    forward.arg("--identity").arg(site.path().join("provisioner"));
    forward.arg("--known-hosts").arg(site.path().join("known_hosts"));
    forward.args(["-L", &format!("{port}:{target}")]);
    let mut forward = site.background(&format!("forward-{port}"), forward);
    forward.says("listening 127.").await;
    (forward, SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Connections that hold a listener up as long as they are let: one that says nothing, one that says half a line, and two
/// that stop in the middle of the key exchange.
async fn dawdlers(address: SocketAddr) -> Vec<TcpStream> {
    let mut all = Vec::new();
    for said in [&b""[..], b"SSH-2.0-x", b"SSH-2.0-x\r\n", b"SSH-2.0-x\r\n\0\0\x04\0\x04\x14"] {
        let mut stream = connect(address).await;
        stream.write_all(said).await.expect("said");
        all.push(stream);
    }
    all
}

#[tokio::test]
async fn nobody_holds_a_gateway_beyond_its_deadline_or_its_second_signal() {
    let (target, flood) = (echo().await, flood().await);
    for (seconds, signals, reason) in [(2, 1, "drained"), (300, 2, "gateway_stopped"), (300, 3, "")] {
        let site = Site::plan().allow(target).allow(flood).door(target).door(flood);
        let mut site = site.drain(Side::Gateway, seconds).start().await;
        let (ssh, through_ssh) = site.local_forward(target).await;
        let (ours, through_ours) = forward(&site, target).await;
        let mut held = Vec::new();
        for address in [site.doors[0], through_ssh, through_ours] {
            let mut stream = connect(address).await;
            echoes(&mut stream, b"running").await;
            held.push(stream);
        }
        // Two more whose client reads nothing, one of them through a session that is shared.
        let (ssh_flood, through_ssh_flood) = site.local_forward(flood).await;
        for address in [site.doors[1], through_ssh_flood] {
            let mut stream = connect(address).await;
            within("a byte", stream.read_u8()).await.expect("read");
            held.push(stream);
        }
        let dawdlers = dawdlers(site.address).await;
        let mut asking = UnixStream::connect(site.admin_socket()).await.expect("the admin socket");
        asking.write_all(b"{").await.expect("written");
        let began = Instant::now();
        for signal in 0..signals {
            site.program(Side::Gateway).signal("TERM");
            if signal == 0 {
                site.program(Side::Gateway).says("draining: ").await;
            }
        }
        // Two signals that come before the first was seen are one: whoever is impatient says it again and again.
        while signals == 3 && !site.program(Side::Gateway).has_ended() {
            assert!(began.elapsed() < SLACK, "the third signal does not end it");
            site.program(Side::Gateway).signal("TERM");
            sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(site.program(Side::Gateway).ended().await.code(), Some(1), "{signals} signals");
        let took = began.elapsed();
        let least = if signals == 1 { u64::from(seconds) } else { 0 };
        let most = Duration::from_secs(least) + SLACK;
        assert!(took >= Duration::from_secs(least) && took < most, "{signals} signals: {took:?}");
        if signals < 3 {
            let ended = site.records(Side::Gateway, &json!({"event": "forward.ended"}));
            assert_eq!(ended.len(), held.len(), "{ended:#?}");
            assert!(ended.iter().all(|it| it["reason"] == reason), "{reason}: {ended:#?}");
            assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
        }
        // The agent sees its gateway close them, or the link go; it has ended none by itself, and none looks like an end.
        eventually("the agent has let go", async || {
            (site.records(Side::Agent, &json!({"event": "forward.ended"})).len() == held.len()).then_some(())
        })
        .await;
        let ended = site.records(Side::Agent, &json!({"event": "forward.ended"}));
        // It was told of the deadline, and of a further signal it was not.
        let told = signals == 1;
        let cut = |it: &Value| match it["reason"].as_str() {
            Some("gateway_drained") => told,
            Some("link_lost" | "client_gone") => !told,
            _ => false,
        };
        assert!(ended.iter().all(cut), "{reason}: {ended:#?}");
        drop((held, dawdlers, asking, ssh, ours, ssh_flood));
        // Whatever it left behind, the next one starts and serves.
        site.restart_gateway().await;
        eventually("a new forward", async || {
            let mut stream = TcpStream::connect(site.doors[0]).await.ok()?;
            stream.write_all(b"after").await.ok()?;
            stream.read_exact(&mut [0; 5]).await.ok().map(drop)
        })
        .await;
        for side in [Side::Agent, Side::Gateway] {
            assert_eq!(site.program(side).stop().await, Some(0), "{side:?}");
        }
    }
}

#[tokio::test]
async fn connections_that_dawdle_do_not_hold_an_idle_gateway() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).drain(Side::Gateway, 300).start().await;
    let dawdlers = dawdlers(site.address).await;
    let (ssh, _) = site.local_forward(target).await;
    let began = Instant::now();
    assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    assert_balanced(Side::Gateway, &site.trail(Side::Gateway));
    drop((dawdlers, ssh));
    site.stop_agent().await;
}

#[tokio::test]
async fn an_agent_that_was_never_linked_ends_at_its_signal() {
    // Nobody listens; somebody accepts and says nothing; somebody says a line and no more; nobody has that name.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let laconic = listen(async |mut stream: TcpStream| {
        drop(stream.write_all(b"SSH-2.0-caponier_1\r\n").await);
        drop(stream.read_to_end(&mut Vec::new()).await);
    })
    .await;
    let closed = SocketAddr::from(([127, 0, 0, 1], free_port()));
    for gateway in [
        format!("ssh://{closed}"),
        format!("ssh://{}", silent.local_addr().expect("an address")),
        format!("ssh://{laconic}"),
        "ssh://nobody.invalid:443".to_owned(),
    ] {
        let mut site = Site::plan().drain(Side::Agent, 300).start_gateway().await;
        let real = format!("ssh://{}", site.address);
        site.restart_agent().await;
        site.program(Side::Agent).kill().await;
        let text = fs::read_to_string(site.config(Side::Agent)).expect("a configuration");
        fs::write(site.config(Side::Agent), text.replace(&real, &gateway)).expect("written");
        let mut command = caponier();
        command.arg("agent").arg("--config").arg(site.config(Side::Agent));
        let mut agent = site.background("agent-alone", command);
        agent.says("agent started").await;
        let began = Instant::now();
        assert_eq!(agent.stop().await, Some(0), "{gateway}: {}", agent.log());
        assert!(began.elapsed() < SLACK, "{gateway}: {:?}", began.elapsed());
        assert_eq!(site.program(Side::Gateway).stop().await, Some(0));
    }
}

#[tokio::test]
async fn a_hangup_during_a_drain_brings_nothing_back() {
    let target = echo().await;
    for side in [Side::Gateway, Side::Agent] {
        let mut site = Site::plan().allow(target).door(target).drain(side, 300).start().await;
        let mut stream = connect(site.doors[0]).await;
        echoes(&mut stream, b"running").await;
        site.program(side).signal("TERM");
        site.program(side).says("draining: ").await;
        for round in 0..10 {
            // With and without something to take over; a configuration that is faulty, too.
            let path = site.config(side);
            let text = fs::read_to_string(&path).expect("a configuration");
            match (round % 3, side) {
                (0, _) => {}
                (1, Side::Agent) => {
                    let rule = "[[organisation.allow]]\nname = \"r\"\naddresses = [\"10.0.0.1/32\"]\nports = [1]\n";
                    fs::write(&path, format!("{text}\n{}", rule.replace("\"r\"", &format!("\"r{round}\""))))
                        .expect("written");
                }
                (1, Side::Gateway) => {
                    let door = format!(
                        "[[local]]\nlisten = \"127.0.0.1:0\"\nagent = \"{AGENT}\"\ntarget = \"{target}\"\n\
                         principal = \"provisioner\"\n"
                    );
                    fs::write(&path, format!("{text}\n{door}")).expect("written");
                }
                _ => {
                    fs::write(&path, "[").expect("written");
                    site.program(side).signal("HUP");
                    echoes(&mut stream, b"goes on").await;
                    fs::write(&path, &text).expect("written");
                }
            }
            site.program(side).signal("HUP");
            echoes(&mut stream, b"goes on").await;
        }
        // Neither a door nor a link has come back.
        if side == Side::Gateway {
            for address in [site.doors[0], site.address] {
                let refused = eventually("nobody listens", async || TcpStream::connect(address).await.err()).await;
                assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
            }
        } else {
            assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"", "nobody is left to serve it");
        }
        assert_eq!(site.records(side, &json!({"event": "link.up"})).len(), 1, "{side:?}");
        stream.shutdown().await.expect("ended");
        assert_eq!(read_to_end(&mut stream).await, b"");
        assert_eq!(site.program(side).ended().await.code(), Some(0), "{side:?}: {}", site.program(side).log());
        assert_balanced(side, &site.trail(side));
        match side {
            Side::Gateway => site.stop_agent().await,
            Side::Agent => assert_eq!(site.program(Side::Gateway).stop().await, Some(0)),
        }
    }
}

#[tokio::test]
async fn a_signal_while_the_trail_cannot_be_written_ends_a_gateway_all_the_same() {
    let target = echo().await;
    let plan = Site::plan().allow(target).door(target).drain(Side::Gateway, 2).trail_to_pipe(Side::Gateway);
    let pipe = plan.path().join("trail.pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).expect("a pipe");
    let options = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let reader = rustix::fs::open(&pipe, options, rustix::fs::Mode::empty()).expect("a reader");
    let mut site = plan.start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"running").await;
    drop(reader);
    // Something to record, which fails.
    assert_eq!(read_to_end(connect(site.doors[0]).await).await, b"", "what cannot be recorded does not open");
    let began = Instant::now();
    site.program(Side::Gateway).signal("TERM");
    let ended = within("its end", site.program(Side::Gateway).ended()).await;
    assert_eq!(ended.code(), Some(1), "a trail that is not whole is no success: {}", site.program(Side::Gateway).log());
    assert!(began.elapsed() < Duration::from_secs(2) + limits::TRAIL_PATIENCE * 2 + SLACK, "{:?}", began.elapsed());
    assert_eq!(read_to_end(&mut stream).await, b"");
    let ended = site.record(Side::Agent, json!({"event": "forward.ended"})).await;
    assert_ne!(ended["reason"], "eof", "{ended}");
    site.stop_agent().await;
}

#[tokio::test]
async fn fifty_hangups_in_a_row_cost_no_forward_and_end_with_the_newest_configuration() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    for side in [Side::Agent, Side::Gateway] {
        let good = fs::read_to_string(site.config(side)).expect("a configuration");
        // Something comes and goes that has nothing to do with the forward; and now and then nothing can be read.
        let other = match side {
            Side::Agent => {
                format!(
                    "{good}\n[[organisation.allow]]\nname = \"other\"\naddresses = [\"10.9.9.9/32\"]\nports = [1]\n"
                )
            }
            Side::Gateway => {
                let local = "[[local]]\nlisten = \"127.0.0.1:0\"\nagent = \"acme/prod-eu\"\n\
                             target = \"10.9.9.9:1\"\nprincipal = \"provisioner\"\n";
                format!("{good}\n{local}")
            }
        };
        let marks = json!({"event": "config.reloaded"});
        let began = Instant::now();
        for round in 0..50 {
            let text = match round % 5 {
                0 | 3 => &other,
                1 | 4 => &good,
                _ => "[",
            };
            fs::write(site.config(side), text).expect("written");
            site.program(side).signal("HUP");
            if round % 10 == 0 {
                echoes(&mut stream, b"meanwhile").await;
                echoes(connect(site.doors[0]).await, b"anew").await;
            }
        }
        // What was written last is what holds in the end, whenever it was read: soon a request finds nothing to change.
        fs::write(site.config(side), &other).expect("written");
        site.program(side).signal("HUP");
        let mut asked = 51;
        loop {
            assert!(began.elapsed() < PATIENCE, "{side:?} never has the newest configuration");
            let before = site.records(side, &marks).len();
            site.program(side).signal("HUP");
            asked += 1;
            let last =
                eventually("a reload", async || site.records(side, &marks).into_iter().skip(before).last()).await;
            if last["detail"] == "nothing changed" {
                break;
            }
        }
        let all = site.records(side, &marks).len() + site.records(side, &json!({"event": "config.rejected"})).len();
        assert!(all <= asked, "{side:?}: {all} reloads for {asked} signals");
        echoes(&mut stream, b"and after").await;
        echoes(connect(site.doors[0]).await, b"anew").await;
    }
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.up"})).len(), 1, "the link is the same");
    assert_eq!(site.records(Side::Gateway, &json!({"event": "forward.failed"})).len(), 0);
    drop(stream);
    site.stop().await;
}
