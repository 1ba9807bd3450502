//! Forwards whose door session lives on another thread than their link. A gateway has two threads at least, and gives the
//! first link and the first session to different ones; each test makes sure of that.

use std::net::SocketAddr;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Duration, Instant, timeout};

use crate::harness::{Program, Side, Site, connect, echo, echoes, eventually, listen, read_to_end, within};

/// What the gateway says of a forward that crosses threads.
const CROSSES: &str = "the link lives on another thread";

/// How many forwards have crossed threads so far.
fn crossed(site: &mut Site) -> usize {
    site.program(Side::Gateway).log().matches(CROSSES).count()
}

/// A session whose forwards cross threads, and where it listens for `target`.
async fn across(site: &mut Site, target: SocketAddr) -> (Program, SocketAddr) {
    let (ssh, address) = site.local_forward(target).await;
    let before = crossed(site);
    echoes(connect(address).await, b"does this cross?").await;
    assert_eq!(crossed(site), before + 1, "the session lives where the link does");
    (ssh, address)
}

#[tokio::test]
async fn a_forward_of_the_loopback_door_stays_on_its_links_thread() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    for _ in 0..4 {
        echoes(connect(site.doors[0]).await, b"on one thread").await;
    }
    assert_eq!(crossed(&mut site), 0);
    let (_ssh, _) = across(&mut site, target).await;
    site.stop().await;
}

#[tokio::test]
async fn each_half_ends_by_itself_across_threads() {
    // A target that answers when it has heard all.
    let target = listen(async |mut stream| {
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.expect("read");
        stream.write_all(&heard).await.expect("written");
    })
    .await;
    let mut site = Site::plan().allow(target).start().await;
    let (ssh, address) = site.local_forward(target).await;
    let mut stream = connect(address).await;
    stream.write_all(b"a question with an end").await.expect("written");
    stream.shutdown().await.expect("half closed");
    assert_eq!(read_to_end(&mut stream).await, b"a question with an end");
    assert_eq!(crossed(&mut site), 1);
    let like = json!({"event": "forward.ended", "reason": "eof", "to_target": 22, "from_target": 22});
    for side in [Side::Gateway, Side::Agent] {
        site.record(side, like.clone()).await;
    }
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn a_forward_across_threads_ends_for_the_reason_that_ended_it() {
    let target = echo().await;
    // Says something, waits for a byte, and breaks.
    let breaks = listen(async |mut stream| {
        stream.write_all(b"last words").await.expect("written");
        stream.read_u8().await.expect("read");
        stream.set_zero_linger().expect("set");
    })
    .await;
    let mut site = Site::plan().allow(target).allow(breaks).start().await;

    let (ssh, address) = across(&mut site, target).await;
    let mut stream = connect(address).await;
    echoes(&mut stream, b"seven b").await;
    // Without an end of file: the session goes with all its channels.
    drop(ssh);
    let like = json!({"event": "forward.ended", "reason": "client_gone", "to_target": 7, "from_target": 7});
    site.record(Side::Gateway, like).await;
    site.record(Side::Agent, json!({"event": "forward.ended", "reason": "client_gone", "to_target": 7})).await;

    let (ssh, address) = site.local_forward(breaks).await;
    let mut stream = connect(address).await;
    let mut words = [0; 10];
    within("the last words", stream.read_exact(&mut words)).await.expect("read");
    stream.write_u8(0).await.expect("written");
    let like = json!({"event": "forward.ended", "reason": "target_broke", "to_target": 1, "from_target": 10});
    site.record(Side::Gateway, like).await;
    drop(ssh);

    let (ssh, address) = across(&mut site, target).await;
    let mut stream = connect(address).await;
    echoes(&mut stream, b"three").await;
    site.program(Side::Agent).kill().await;
    assert_eq!(read_to_end(&mut stream).await, b"");
    site.record(Side::Gateway, json!({"event": "forward.ended", "reason": "link_lost", "to_target": 5})).await;
    drop(ssh);
    assert!(crossed(&mut site) >= 5);
}

#[tokio::test]
async fn a_revocation_cuts_both_halves_of_a_forward_across_threads() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let (ssh, address) = across(&mut site, target).await;
    let mut stream = connect(address).await;
    echoes(&mut stream, b"allowed").await;
    // With both directions full: nothing moves, and it must end all the same.
    let mut full = connect(address).await;
    let chunk = vec![7; 65_536];
    while timeout(Duration::from_secs(1), full.write_all(&chunk)).await.is_ok() {}
    site.registry().about_key("acme/principals/provisioner", "one", "revoked = true");
    for stream in [&mut stream, &mut full] {
        read_to_end(stream).await;
    }
    for side in [Side::Gateway, Side::Agent] {
        eventually("both have ended", async || {
            let ended = site.records(side, &json!({"event": "forward.ended"}));
            let revoked = ended.iter().filter(|record| record["reason"] == "revoked").count();
            (ended.len() == 3 && (revoked == 2 || side == Side::Agent)).then_some(())
        })
        .await;
    }
    drop(ssh);
    site.stop().await;
}

/// Writes and reads at once until `until`, and compares.
async fn saturate(address: SocketAddr, until: Instant) -> usize {
    let (mut read, mut write) = connect(address).await.into_split();
    let pattern: Vec<u8> = (0..65_521_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let writing = async {
        let mut written = 0;
        while Instant::now() < until {
            write.write_all(&pattern).await.expect("written");
            written += pattern.len();
        }
        write.shutdown().await.expect("shut down");
        written
    };
    let reading = async {
        let (mut seen, mut buffer) = (0, vec![0; 65_536]);
        loop {
            let count = read.read(&mut buffer).await.expect("read");
            if count == 0 {
                break seen;
            }
            let start = seen % pattern.len();
            let expected = pattern.iter().cycle().skip(start).take(count);
            assert!(buffer[..count].iter().eq(expected), "not what was sent, after {seen} bytes");
            seen += count;
        }
    };
    let (written, seen) = within("a saturated echo", async { tokio::join!(writing, reading) }).await;
    assert_eq!(written, seen);
    seen
}

#[tokio::test]
async fn a_saturated_echo_across_threads_loses_nothing_and_counts_everything() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let (ssh, address) = across(&mut site, target).await;
    let until = Instant::now() + Duration::from_secs(5);
    let (one, other) = tokio::join!(saturate(address, until), saturate(address, until));
    drop(ssh);
    for side in [Side::Gateway, Side::Agent] {
        eventually("three endings with all bytes", async || {
            let ended = site.records(side, &json!({"event": "forward.ended", "reason": "eof"}));
            let sum = |field: &str| ended.iter().filter_map(|record| record[field].as_u64()).sum::<u64>();
            let all = (one + other + b"does this cross?".len()) as u64;
            (ended.len() == 3 && sum("to_target") == all && sum("from_target") == all).then_some(())
        })
        .await;
    }
    assert_eq!(crossed(&mut site), 3);
    site.stop().await;
}

const EACH: usize = 25;

/// Makes one short forward after another.
async fn many_short(address: SocketAddr, number: u8) -> std::io::Result<()> {
    for turn in 0..EACH {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&[number, turn as u8]).await?;
        stream.shutdown().await?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await?;
        assert_eq!(back, [number, turn as u8]);
    }
    Ok(())
}

#[tokio::test]
async fn many_short_forwards_of_many_clients_cross_threads() {
    const CLIENTS: usize = 16;
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let (ssh, address) = across(&mut site, target).await;
    let tasks = caponier::task::Tasks::new();
    let clients: Vec<_> = (0..CLIENTS).map(|number| tasks.spawn(many_short(address, number as u8))).collect();
    for client in clients {
        within("a client", client).await.expect("ran").expect("served");
    }
    assert_eq!(crossed(&mut site), 1 + CLIENTS * EACH);
    for side in [Side::Gateway, Side::Agent] {
        eventually("all have ended well", async || {
            let ended = site.records(side, &json!({"event": "forward.ended", "reason": "eof"}));
            (ended.len() == 1 + CLIENTS * EACH).then_some(())
        })
        .await;
    }
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn an_open_across_threads_that_nobody_waits_for_is_closed_when_it_comes() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let (_ssh, beside) = across(&mut site, target).await;
    // The agent answers nothing for a while, and the client that asks goes away meanwhile.
    site.program(Side::Agent).signal("STOP");
    let asks = site.ssh(&["-W", &target.to_string()]);
    let asks = site.background("asks", asks);
    eventually("it is asked for", async || {
        (site.records(Side::Gateway, &json!({"event": "forward.open"})).len() == 2).then_some(())
    })
    .await;
    drop(asks);
    site.record(Side::Gateway, json!({"event": "forward.abandoned"})).await;
    site.program(Side::Agent).signal("CONT");
    echoes(connect(beside).await, b"and the link goes on").await;
    eventually("the agent's end of it has ended", async || {
        let count = |event: &str| site.records(Side::Agent, &json!({"event": event})).len();
        let ended = count("forward.ended") + count("forward.abandoned") + count("forward.failed");
        (count("forward.open") == ended).then_some(())
    })
    .await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    site.stop().await;
}

#[tokio::test]
async fn threads_end_with_the_gateway() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).start().await;
    let (ssh, address) = across(&mut site, target).await;
    let _open: TcpStream = connect(address).await;
    let pid = site.program(Side::Gateway).pid();
    let names: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("its threads")
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .collect();
    assert!(names.iter().any(|name| name.trim() == "caponier-1"), "{names:?}");
    drop(ssh);
    site.stop().await;
}
