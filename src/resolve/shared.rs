//! Lookups under way: each question is asked once at a time, and who asks it meanwhile shares the answer.
//!
//! Promised: whoever gives up waiting takes nothing from the others; a lookup that breaks off is an error for those who wait,
//! and the next who asks begins another; no more than a fixed number are under way.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// The lookups under way, each with those who wait for it.
pub(super) struct Shared<K, T> {
    under_way: Arc<UnderWay<K, T>>,
    most: usize,
}

type UnderWay<K, T> = Mutex<HashMap<K, watch::Receiver<Option<T>>>>;

/// Why there was no answer to share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// As many as may be are under way.
    Busy,
    /// Its thread or task panicked, or the program is going down.
    BrokenOff,
}

/// Whoever holds it owes the answer to those who wait; if it goes without one, the next who asks begins another lookup.
pub(super) struct Owed<K: Eq + Hash, T> {
    under_way: Arc<UnderWay<K, T>>,
    question: K,
    sender: watch::Sender<Option<T>>,
}

impl<K: Eq + Hash + Clone, T: Clone> Shared<K, T> {
    pub(super) fn new(most: usize) -> Self {
        Self { under_way: Arc::default(), most }
    }

    /// Waits for the answer that is under way, or has `begin` bring it about.
    pub(super) async fn join(&self, question: &K, begin: impl FnOnce(Owed<K, T>)) -> Result<T, Unanswered> {
        let (mut answer, owed) = {
            let mut lookups = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            match lookups.get(question) {
                Some(answer) => (answer.clone(), None),
                None if lookups.len() >= self.most => return Err(Unanswered::Busy),
                None => {
                    let (sender, answer) = watch::channel(None);
                    lookups.insert(question.clone(), answer.clone());
                    (answer, Some(Owed { under_way: self.under_way.clone(), question: question.clone(), sender }))
                }
            }
        };
        // Not under the lock: a runtime that is going down drops the lookup at once.
        if let Some(owed) = owed {
            begin(owed);
        }
        let found = answer.wait_for(Option::is_some).await;
        found.ok().and_then(|found| found.clone()).ok_or(Unanswered::BrokenOff)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.under_way.lock().expect("whole").len()
    }
}

impl<K: Eq + Hash, T> Owed<K, T> {
    pub(super) fn question(&self) -> &K {
        &self.question
    }

    pub(super) fn answer(self, answer: T) {
        self.sender.send_replace(Some(answer));
    }
}

impl<K: Eq + Hash, T> Drop for Owed<K, T> {
    fn drop(&mut self) {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.question);
    }
}
