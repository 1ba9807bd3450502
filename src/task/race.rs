//! Several futures of one task: the first that succeeds, or all of them.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

/// Begins one attempt after the other, the next whenever the last one has gone on for `delay` or one has failed, at most
/// `at_once` side by side, and returns what succeeds first. The others are dropped then, wherever they are; those whose turn
/// has not come are never begun.
///
/// # Errors
/// If none succeeds: why each did not, in the order in which they failed.
pub async fn staggered<A, T, E>(
    delay: Duration,
    at_once: usize,
    attempts: impl IntoIterator<Item = A>,
) -> Result<T, Vec<E>>
where
    A: Future<Output = Result<T, E>>,
{
    let mut waiting = attempts.into_iter().peekable();
    let mut running: Vec<Pin<Box<A>>> = Vec::new();
    let mut failures = Vec::new();
    loop {
        if running.len() < at_once.max(1)
            && let Some(next) = waiting.next()
        {
            running.push(Box::pin(next));
        }
        if running.is_empty() {
            return Err(failures);
        }
        let another = waiting.peek().is_some() && running.len() < at_once.max(1);
        tokio::select! {
            // First: what has succeeded by now spares the next one.
            biased;
            (at, outcome) = any(&mut running) => {
                drop(running.remove(at));
                match outcome {
                    Ok(won) => return Ok(won),
                    Err(error) => failures.push(error),
                }
            }
            () = tokio::time::sleep(delay), if another => {}
        }
    }
}

/// Waits for all of them side by side; what they yield, in their order.
pub async fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<(usize, Pin<Box<F>>)> =
        futures.into_iter().enumerate().map(|(at, future)| (at, Box::pin(future))).collect();
    let mut done = Vec::with_capacity(running.len());
    poll_fn(|cx| {
        running.retain_mut(|(at, future)| match future.as_mut().poll(cx) {
            Poll::Ready(output) => {
                done.push((*at, output));
                false
            }
            Poll::Pending => true,
        });
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, output)| output).collect()
}

/// Waits for any of `running`, of which there is one at least.
async fn any<F: Future>(running: &mut [Pin<Box<F>>]) -> (usize, F::Output) {
    poll_fn(|cx| {
        for (at, future) in running.iter_mut().enumerate() {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready((at, output));
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::time::{Instant, sleep};

    use super::*;

    const DELAY: Duration = Duration::from_millis(250);

    /// Attempts that each take so many milliseconds and then succeed or fail; what came of it, and when each began.
    async fn run(at_once: usize, plan: &[(u64, bool)]) -> (Result<usize, Vec<usize>>, Vec<u64>, u64) {
        let (start, begun) = (Instant::now(), Mutex::new(Vec::new()));
        let outcome = staggered(
            DELAY,
            at_once,
            plan.iter().enumerate().map(|(at, &(millis, succeeds))| {
                let begun = &begun;
                async move {
                    begun.lock().expect("whole").push(u64::try_from(start.elapsed().as_millis()).expect("short"));
                    sleep(Duration::from_millis(millis)).await;
                    if succeeds { Ok(at) } else { Err(at) }
                }
            }),
        )
        .await;
        let took = u64::try_from(start.elapsed().as_millis()).expect("short");
        (outcome, begun.into_inner().expect("whole"), took)
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_to_try_fails_at_once() {
        assert_eq!(run(4, &[]).await, (Err(vec![]), vec![], 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_brings_the_next_one_on_at_once_and_each_failure_is_told() {
        let (outcome, begun, took) = run(4, &[(10, false), (400, false), (20, false)]).await;
        assert_eq!((outcome, begun, took), (Err(vec![0, 2, 1]), vec![0, 10, 260], 410));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_to_succeed_wins_and_the_next_are_never_begun() {
        assert_eq!(run(4, &[(200, true), (1, true)]).await, (Ok(0), vec![0], 200));
        assert_eq!(run(4, &[(9_000, true), (100, true), (1, true)]).await, (Ok(1), vec![0, 250], 350));
        assert_eq!(run(4, &[(300, true), (9_000, true), (1, true)]).await, (Ok(0), vec![0, 250], 300));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_so_many_run_side_by_side() {
        let slow = [(1_000, false), (1_000, false), (1_000, false), (10, true), (1, true)];
        assert_eq!(run(2, &slow).await, (Ok(3), vec![0, 250, 1_000, 1_250], 1_260));
        assert_eq!(run(0, &slow[..2]).await, (Err(vec![0, 1]), vec![0, 1_000], 2_000));
    }

    #[tokio::test(start_paused = true)]
    async fn all_run_side_by_side_and_are_told_in_their_order() {
        let start = Instant::now();
        let slow = |millis| async move {
            sleep(Duration::from_millis(millis)).await;
            millis
        };
        assert_eq!(all([300, 100, 200].map(slow)).await, [300, 100, 200]);
        assert_eq!(start.elapsed(), Duration::from_millis(300));
        assert_eq!(all::<std::future::Ready<()>>([]).await, [] as [(); 0]);
    }
}
