//! What a channel has received and its sink has not taken.
//!
//! Promised: what is here is accounted for until its sink has taken it, and given back when nobody takes it any more.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, Bytes};
use tokio::sync::Notify;

use crate::tunnel::ssh::Returns;
use crate::tunnel::wire;

/// What a channel has received and its sink has not taken. Credit, or the session's own count, bounds it.
pub(super) struct Inbox {
    state: Mutex<InboxState>,
    filled: Notify,
    returns: Returns,
}

#[derive(Default)]
struct InboxState {
    waiting: VecDeque<Waiting>,
    /// Set while the sender waits for credit.
    starved: bool,
    last: Option<Last>,
}

/// A message, of which the sink may have taken a part.
struct Waiting {
    left: Bytes,
    /// What it had when it came, for which it is accounted.
    length: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Last {
    /// Nothing for now, because the sender has no credit.
    Starved,
    Eof,
    Broken(io::ErrorKind),
}

impl Inbox {
    pub(super) fn new(returns: Returns) -> Self {
        Self { state: Mutex::default(), filled: Notify::new(), returns }
    }

    pub(super) fn push(&self, bytes: Bytes) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some() {
            // Data after EOF, which RFC 4254 §5.3 forbids.
            return self.returns.dropped(bytes.len());
        }
        state.waiting.push_back(Waiting { length: bytes.len(), left: bytes });
        self.filled.notify_one();
    }

    /// Says how the channel's data ended; only the first word counts.
    pub(super) fn end(&self, last: Last) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last.get_or_insert(last);
        self.filled.notify_one();
    }

    pub(super) fn starve(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).starved = true;
        self.filled.notify_one();
    }

    /// What comes next: all that has come, up to so many `messages`. It stays here until it is [shifted](Inbox::shift) out, so
    /// that it is accounted for whatever happens.
    pub(super) async fn front(&self, messages: usize) -> Result<Vec<Bytes>, Last> {
        loop {
            let filled = self.filled.notified();
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if !state.waiting.is_empty() {
                    return Ok(state.waiting.iter().take(messages).map(|waiting| waiting.left.clone()).collect());
                }
                if std::mem::take(&mut state.starved) {
                    return Err(Last::Starved);
                }
                if let Some(last) = state.last {
                    return Err(last);
                }
            }
            filled.await;
        }
    }

    /// Takes what waits, and all that comes, for nobody.
    pub(super) async fn discard(&self) {
        // A sender without credit has it as soon as all is taken.
        loop {
            match self.front(usize::MAX).await {
                Ok(batch) => {
                    let sent = batch.iter().map(Bytes::len).sum();
                    drop(batch);
                    self.returns.repay(self.shift(sent)).await;
                }
                Err(Last::Starved) => {}
                Err(Last::Eof | Last::Broken(_)) => return,
            }
        }
    }

    /// Counts `sent` bytes as taken by the sink, and tells the cost of the messages that are thereby done with.
    pub(super) fn shift(&self, mut sent: usize) -> usize {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while let Some(first) = state.waiting.front_mut().filter(|_| sent > 0) {
            let part = sent.min(first.left.len());
            first.left.advance(part);
            sent -= part;
            if first.left.is_empty() {
                done += wire::message_cost(first.length);
                state.waiting.pop_front();
            }
        }
        done
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.waiting.iter().for_each(|waiting| self.returns.dropped(waiting.length));
    }
}
