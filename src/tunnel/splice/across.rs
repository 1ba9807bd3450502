//! A forward in two halves, each on the thread of its side.
//!
//! Promised: both halves end, whichever is dropped or cut first; how they ended is told once, by the principal's half, after the
//! target's has said its word.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::side::{Bridge, Side};
use super::{Bounds, End, VIOLATED, splice};
use crate::audit::Counters;
use crate::tunnel::bridge;

/// Parts a forward in two: the side that stands for the target in the principal's half, and the target's half, which is to
/// [run](Across::run) on the thread of the target's side. Dropping either breaks the other.
#[must_use]
pub fn across(counters: Arc<Counters>) -> (Side, Across) {
    let (near, far) = bridge::pair();
    let (verdict, ended) = oneshot::channel();
    let cut = CancellationToken::new();
    let violated = CancellationToken::new();
    let rest = Rest { leave: near.leave(), cut: cut.clone(), violated: violated.clone(), ended };
    (Side::Bridge(Bridge { end: near, rest: Some(rest) }), Across { end: far, counters, cut, violated, verdict })
}

/// The target's half of a forward whose sides live on different threads.
pub struct Across {
    end: bridge::End,
    counters: Arc<Counters>,
    cut: CancellationToken,
    violated: CancellationToken,
    verdict: oneshot::Sender<End>,
}

impl Across {
    /// Runs it to its end, and closes `far`.
    pub async fn run(self, far: Side) {
        let near = Side::Bridge(Bridge { end: self.end, rest: None });
        let (end, remains) = splice(near, far, &self.counters, Bounds::default(), &self.cut).await;
        if end == VIOLATED {
            self.violated.cancel();
        }
        // If nobody waits for it any more, the other half has been dropped.
        self.verdict.send(end).ok();
        remains.leave().await;
    }
}

/// The principal's hold on the target's half.
pub(super) struct Rest {
    leave: bridge::Leave,
    cut: CancellationToken,
    /// Fires when the target's side has broken the rules: what it has sent before is not delivered any more.
    pub(super) violated: CancellationToken,
    ended: oneshot::Receiver<End>,
}

impl Rest {
    /// Ends the target's half after the principal's, and tells how both together ended. What was given to it is still
    /// delivered, unless the forward was or is `cut`.
    pub(super) async fn end(
        mut self,
        ours: Ours,
        mut moving: Pin<&mut impl Future<Output = Infallible>>,
        cut: Pin<&mut impl Future<Output = End>>,
    ) -> End {
        self.leave.now();
        let mut end = ours.end;
        if !ours.cut {
            tokio::select! {
                biased;
                theirs = &mut self.ended => return ours.with(theirs.ok()),
                never = moving.as_mut() => match never {},
                how = cut => end = how,
            }
        }
        self.cut.cancel();
        // Soon; after it nothing more is counted.
        tokio::select! {
            _ = self.ended => end,
            never = moving => match never {},
        }
    }
}

/// How the principal's half ended, or a forward that has no other.
pub(super) struct Ours {
    pub(super) end: End,
    /// Whether it was cut or given up, so that nothing is to be waited for.
    pub(super) cut: bool,
    /// Whether all was done to deliver what the principal had sent; what goes wrong at the target since is not the reason.
    pub(super) delivered: bool,
}

impl Ours {
    /// How both halves together ended. Without a word from the target's its thread is going down, and so is the program.
    fn with(self, theirs: Option<End>) -> End {
        match (self.end, theirs) {
            (End::NearBroke(_), _) if self.delivered => self.end,
            (_, Some(theirs @ (End::FarBroke(_) | End::Stalled))) => theirs,
            // That the principal's side is gone is what it has been told by this one.
            _ => self.end,
        }
    }
}
