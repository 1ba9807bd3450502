//! Tests of the module above.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::task::{Crew, Tasks};

const DEADLINE: Duration = Duration::from_secs(180);

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

/// Whether a future waits for something.
async fn waits(future: impl Future) -> bool {
    tokio::time::timeout(Duration::from_millis(20), future).await.is_err()
}

fn bytes(length: usize, seed: u8) -> Bytes {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
}

#[tokio::test]
async fn an_end_that_goes_away_is_a_break_after_all_that_it_gave() {
    for leaves_by_itself in [false, true] {
        let (mut one, mut other) = pair();
        one.writer.send(Bytes::from_static(b"last")).await.expect("given");
        if leaves_by_itself {
            one.leave().now();
            let error = one.writer.send(Bytes::from_static(b"more")).await.expect_err("it has left");
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        } else {
            drop(one);
        }
        assert!(other.reader.is_closed());
        assert_eq!(other.reader.next().await.expect("bytes"), Some(vec![Bytes::from_static(b"last")]));
        assert_eq!(other.reader.next().await.expect_err("a break").kind(), io::ErrorKind::ConnectionReset);
        let error = other.writer.send(Bytes::from_static(b"x")).await.expect_err("nobody is there");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(other.writer.finish().expect_err("nobody is there").kind(), io::ErrorKind::BrokenPipe);
    }
}

#[tokio::test]
async fn an_end_of_file_is_passed_on_by_itself_and_leaving_after_it_is_no_break() {
    let (mut one, mut other) = pair();
    one.writer.finish().expect("finished");
    assert_eq!(other.reader.next().await.expect("an end"), None);
    assert!(!other.reader.is_closed() && waits(other.reader.closed()).await);
    other.writer.send(Bytes::from_static(b"answer")).await.expect("given");
    assert_eq!(one.reader.next().await.expect("bytes"), Some(vec![Bytes::from_static(b"answer")]));
    drop(one);
    within("the other end has gone", other.reader.closed()).await;
    assert_eq!(other.reader.next().await.expect("an end"), None);
}

#[tokio::test]
async fn bytes_and_messages_are_bounded_until_they_are_taken() {
    for size in [1, limits::CHUNK, 2 * limits::BRIDGE_BYTES] {
        let (mut one, mut other) = pair();
        let mut given = 0;
        while !waits(one.writer.send(bytes(size, 1))).await {
            given += 1;
        }
        assert_eq!(given, (limits::BRIDGE_BYTES / size).clamp(1, limits::BRIDGE_MESSAGES), "of {size}");
        let mut here = Vec::new();
        while here.len() < given {
            let batch = other.reader.next().await.expect("bytes").expect("bytes");
            assert!(batch.len() <= limits::BATCH);
            here.extend(batch);
        }
        assert!(waits(one.writer.send(bytes(size, 1))).await, "what was read is not taken yet");
        let (sent, ()) = within("room", async {
            tokio::join!(one.writer.send(bytes(size, 1)), async { other.reader.taken(&here) })
        })
        .await;
        sent.expect("given");
    }
}

#[tokio::test]
async fn each_message_is_receipted_once_and_seldom() {
    let (mut one, mut other) = pair();
    let receipts = one.writer.receipts();
    assert_eq!(receipts.drained().await, 0);
    let count = limits::BRIDGE_BYTES / limits::CHUNK;
    for _ in 0..count {
        one.writer.send(bytes(limits::CHUNK, 1)).await.expect("given");
    }
    let mut told = 0;
    let mut times = 0;
    let here = other.reader.next().await.expect("bytes").expect("bytes");
    assert_eq!(here.len(), count);
    for (taken, bytes) in here.into_iter().enumerate() {
        other.reader.taken(&[bytes]);
        if let Ok(cost) = tokio::time::timeout(Duration::from_millis(20), receipts.taken()).await {
            told += cost;
            times += 1;
        }
        assert!(told <= (taken + 1) * wire::message_cost(limits::CHUNK));
        assert_eq!(receipts.total(), taken as u64 + 1);
    }
    assert_eq!(told, count * wire::message_cost(limits::CHUNK), "the last of them is told of");
    assert!(times < count, "{times} times for {count} messages");
    // A little is not worth telling, unless somebody waits for all.
    one.writer.send(bytes(100, 1)).await.expect("given");
    let here = other.reader.next().await.expect("bytes").expect("bytes");
    let (cost, ()) = within("all", async {
        tokio::join!(receipts.drained(), async {
            tokio::task::yield_now().await;
            other.reader.taken(&here);
        })
    })
    .await;
    assert_eq!(cost, wire::message_cost(100));
    one.writer.send(bytes(1000, 1)).await.expect("given");
    let here = other.reader.next().await.expect("bytes").expect("bytes");
    other.reader.taken(&here);
    one.writer.send(bytes(500, 1)).await.expect("given");
    assert!(waits(receipts.taken()).await);
    assert_eq!(receipts.rest(), wire::message_cost(1000) + wire::message_cost(500), "both are to be given up");
}

#[tokio::test]
async fn giving_up_frees_a_giver_that_waits() {
    let (mut one, mut other) = pair();
    while !waits(one.writer.send(bytes(limits::CHUNK, 1))).await {}
    let (sent, ()) = within("the giver", async {
        tokio::join!(one.writer.send(bytes(limits::CHUNK, 1)), async {
            tokio::task::yield_now().await;
            other.reader.give_up();
        })
    })
    .await;
    assert_eq!(sent.expect_err("nobody takes it").kind(), io::ErrorKind::BrokenPipe);
}

/// What one end does.
#[derive(Debug, Clone)]
struct Plan {
    /// What it gives, one after another.
    sizes: Vec<usize>,
    /// How often it steps back between two of them.
    pause: u8,
    /// After how many it goes away without a word, if it does.
    cut: Option<usize>,
    /// How often it steps back between two that it takes.
    digest: u8,
}

fn plan() -> impl Strategy<Value = Plan> {
    let sizes = proptest::collection::vec(prop_oneof![1_usize..200, 1_usize..70_000], 0..120);
    (sizes, 0_u8..3, proptest::option::weighted(0.3, 0_usize..120), 0_u8..3)
        .prop_map(|(sizes, pause, cut, digest)| Plan { sizes, pause, cut, digest })
}

/// Plays one end: what it got, and whether that was all.
async fn play(end: End, plan: Plan, seed: u8) -> (Vec<u8>, bool) {
    let End { mut reader, mut writer } = end;
    let mut got = Vec::new();
    let giving = async {
        let all = bytes(plan.sizes.iter().sum(), seed);
        let mut at = 0;
        for (number, size) in plan.sizes.iter().enumerate() {
            if plan.cut == Some(number) {
                return true;
            }
            if writer.send(all.slice(at..at + size)).await.is_err() {
                return false;
            }
            at += size;
            for _ in 0..plan.pause {
                tokio::task::yield_now().await;
            }
        }
        drop(writer.finish());
        false
    };
    let mut clean = false;
    let taking = async {
        while let Ok(next) = reader.next().await {
            let Some(batch) = next else {
                clean = true;
                return;
            };
            for _ in 0..plan.digest {
                tokio::task::yield_now().await;
            }
            batch.iter().for_each(|bytes| got.extend_from_slice(bytes));
            reader.taken(&batch);
        }
    };
    {
        tokio::pin!(giving, taking);
        // A cut drops both halves at once.
        tokio::select! {
            cut = &mut giving => if !cut { taking.await },
            () = &mut taking => { giving.await; }
        }
    }
    (got, clean)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Two threads, random sizes, pauses, half-closes and cuts: what arrives is a prefix of what was given, and all of it where
    /// it ended cleanly.
    #[test]
    fn what_arrives_over_two_threads_is_what_was_given(one in plan(), other in plan()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (crew, threads) = Crew::start("test", 2, DEADLINE).expect("a crew");
            let tasks = Tasks::new();
            let (near, far) = pair();
            let theirs = crew.workers()[1].spawn(&tasks, play(far, other.clone(), 2));
            let ours = crew.workers()[0].spawn(&tasks, play(near, one.clone(), 1));
            let (up, up_clean) = within("the far end", theirs).await.expect("ran");
            let (down, down_clean) = within("the near end", ours).await.expect("ran");
            for (got, clean, plan, seed) in [(up, up_clean, &one, 1), (down, down_clean, &other, 2)] {
                let sent = bytes(plan.sizes.iter().sum(), seed);
                assert!(sent.starts_with(&got), "not a prefix of what was given");
                let cut = plan.cut.is_some_and(|cut| cut < plan.sizes.len());
                assert!(!clean || got.len() == sent.len() && !cut, "it ended cleanly, and is not all");
            }
            if one.cut.is_none() && other.cut.is_none() {
                assert!(up_clean && down_clean);
            }
            threads.end(DEADLINE).await.expect("ended");
        });
    }
}
