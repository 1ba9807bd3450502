//! Streams at full speed, and streams that nobody reads.

use std::net::SocketAddr;

use caponier::limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};

use crate::harness::{Side, Site, connect, echo, echoes, eventually, listen, within};

/// Far more than all windows, queues and buffers on the way together.
const MUCH: usize = 64 << 20;

/// Writes and reads at once as fast as it goes, and compares.
async fn saturate(address: SocketAddr, total: usize) {
    let (mut read, mut write) = connect(address).await.into_split();
    // A prime, so that a lost or repeated chunk of any power of two is seen.
    let pattern: Vec<u8> = (0..65_521_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let writing = async {
        let mut written = 0;
        while written < total {
            let count = pattern.len().min(total - written);
            write.write_all(&pattern[..count]).await.expect("written");
            written += count;
        }
        write.shutdown().await.expect("shut down");
    };
    let reading = async {
        let (mut seen, mut buffer) = (0, vec![0; 65_536]);
        loop {
            let count = read.read(&mut buffer).await.expect("read");
            if count == 0 {
                break seen;
            }
            for byte in &buffer[..count] {
                assert!(*byte == pattern[seen % pattern.len()], "byte {seen} is another");
                seen += 1;
            }
        }
    };
    let ((), seen) = within("a saturated echo", async { tokio::join!(writing, reading) }).await;
    assert_eq!(seen, total);
}

/// Writes without ever reading until nothing moves any more.
async fn fill(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address).await;
    let (chunk, mut written) = (vec![7; 65_536], 0);
    while let Ok(count) = timeout(Duration::from_secs(2), stream.write(&chunk)).await {
        written += count.expect("written");
        assert!(written < 4 * MUCH, "it never blocks: somebody buffers without a bound");
    }
    stream
}

#[tokio::test]
async fn a_saturated_echo_loses_nothing_at_either_door() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let (ssh, through_ssh) = site.local_forward(target).await;
    saturate(site.doors[0], MUCH).await;
    saturate(through_ssh, MUCH).await;
    // All together, over one link and one session.
    let share = MUCH / 8;
    tokio::join!(
        saturate(site.doors[0], share),
        saturate(site.doors[0], share),
        saturate(through_ssh, share),
        saturate(through_ssh, share),
    );
    drop(ssh);
    for side in [Side::Gateway, Side::Agent] {
        eventually("six endings with all bytes", async || {
            let ended = site.records(side, &json!({"event": "forward.ended", "reason": "eof"}));
            let bytes: u64 = ended.iter().filter_map(|record| record["from_target"].as_u64()).sum();
            (ended.len() == 6 && bytes == (2 * MUCH + 4 * share) as u64).then_some(())
        })
        .await;
    }
    site.stop().await;
}

#[tokio::test]
async fn a_stream_that_nobody_reads_hinders_no_other() {
    let (target, flood) = (echo().await, flood().await);
    let site = Site::plan().allow(target).allow(flood).door(target).door(flood).start().await;
    let mut ssh = Vec::new();
    for target in [target, flood] {
        ssh.push(site.local_forward(target).await);
    }
    let mut before = connect(site.doors[0]).await;
    echoes(&mut before, b"open before").await;
    let mut stalled = Vec::new();
    // One that is sent to and never read, and two that are never read while the target sends without an end.
    stalled.push(fill(site.doors[0]).await);
    for address in [site.doors[1], ssh[1].1] {
        let mut stream = connect(address).await;
        within("the first byte", stream.read_u8()).await.expect("read");
        stalled.push(stream);
    }
    for _ in 0..4 {
        saturate(site.doors[0], MUCH / 16).await;
        saturate(ssh[0].1, MUCH / 16).await;
        echoes(&mut before, b"still served").await;
    }
    // And a new client gets in.
    let (other, beside) = site.local_forward(target).await;
    echoes(connect(beside).await, b"another session").await;
    assert_eq!(site.records(Side::Gateway, &json!({"event": "forward.ended", "reason": "link_lost"})).len(), 0);
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    drop((stalled, other, before));
    for (mut ssh, _) in ssh {
        assert!(!ssh.has_ended(), "a session was cut");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_client_that_sends_and_never_reads_loses_its_forward_alone() {
    let target = echo().await;
    let site = Site::plan().allow(target).start().await;
    let (mut ssh, address) = site.local_forward(target).await;
    let mut other = connect(address).await;
    echoes(&mut other, b"open before").await;
    let stalled = fill(address).await;
    assert!(!ssh.has_ended(), "the session was cut: {}", ssh.log());
    // Nothing of its session is read while its queue is full, and after a while that forward is given up.
    let given_up = async {
        loop {
            let ended = site.records(Side::Gateway, &json!({"event": "forward.ended"}));
            if let [ended] = &ended[..] {
                break ended.clone();
            }
            assert!(ended.is_empty() && !ssh.has_ended(), "more than one forward has ended: {ended:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let ended = timeout(limits::STALL * 2, given_up).await.expect("the stalled forward is given up");
    assert_eq!(ended["reason"], "stalled", "{ended}");
    echoes(&mut other, b"still there").await;
    drop((stalled, other, ssh));
    site.stop().await;
}

/// A target that sends without an end.
async fn flood() -> SocketAddr {
    listen(async |mut stream| {
        let chunk = [b'x'; 65_536];
        while stream.write_all(&chunk).await.is_ok() {}
    })
    .await
}

#[tokio::test]
async fn one_principal_has_so_many_forwards_at_once_and_no_more() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let mut streams = Vec::new();
    for _ in 0..limits::FORWARDS_PER_PRINCIPAL {
        streams.push(connect(site.doors[0]).await);
    }
    for stream in &mut streams {
        echoes(stream, b"served").await;
    }
    let mut surplus = connect(site.doors[0]).await;
    let refused = within("the refusal", surplus.read_u8()).await;
    assert!(refused.is_err(), "there was room for one more");
    site.record(
        Side::Gateway,
        json!({"event": "forward.denied", "reason": "limit", "detail": "forwards_per_principal"}),
    )
    .await;
    drop(streams.pop());
    eventually("room for another", async || {
        let mut stream = connect(site.doors[0]).await;
        stream.write_all(b"x").await.ok()?;
        timeout(Duration::from_secs(5), stream.read_u8()).await.ok()?.ok()
    })
    .await;
    drop(streams);
    // A thousand endings take their time, which is no part of a drain's.
    for side in [Side::Gateway, Side::Agent] {
        eventually("the end of all", async || {
            let ended = site.records(side, &json!({"event": "forward.ended"})).len();
            (ended >= limits::FORWARDS_PER_PRINCIPAL).then_some(())
        })
        .await;
    }
    site.stop().await;
}
