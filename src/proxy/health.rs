//! Whether the proxy can be used: also whether the upstreams of its listeners answer. How a connection to one went last counts
//! for [`limits::HEALTH_KEPT`], after which one is made for the purpose, when somebody asks.

use std::sync::Arc;

use tokio::time::timeout;

use super::Proxy;
use super::live::State;
use super::outward::{self, Found, Inside, Standing};
use crate::audit::Culprit;
use crate::health::{self, Part};
use crate::limits;
use crate::proxy::Upstream;
use crate::task::all;

impl health::State for Proxy {
    fn side(&self) -> &'static str {
        "proxy"
    }

    async fn parts(&self) -> Vec<Part> {
        let state = self.state.current();
        let mut parts = vec![
            Part::trail(*self.trail.failed().borrow(), self.trail.culprit().as_ref().map(Culprit::words)),
            Part::drain(self.drain.since()),
        ];
        parts.extend(all(state.used().into_iter().map(|upstream| self.upstream(&state, upstream))).await);
        parts
    }
}

impl Proxy {
    async fn upstream(&self, state: &State, upstream: &Arc<Upstream>) -> Part {
        let known = self.standings.of(&upstream.name).filter(|standing| standing.at.elapsed() < limits::HEALTH_KEPT);
        let Standing { answers, since, .. } = match known {
            Some(standing) => standing,
            None => {
                let mut found = Found::default();
                let inside = if upstream.tls.is_some() { Inside::Tls } else { Inside::Theirs };
                let reaching = outward::reach(state.trial(upstream), inside, &mut found);
                let answers = matches!(timeout(limits::HEALTH_PROBE, reaching).await, Ok(Ok(_)));
                self.standings.note(&upstream.name, answers)
            }
        };
        let part = match answers {
            true => Part::ready("upstream"),
            false => Part::failing(
                "upstream",
                "it does not answer",
                "look whether it is up and the way to it is open; the log and the trail say how connections to it end",
            ),
        };
        Part { upstream: Some(upstream.name.clone()), ..part.since(Some(since)) }
    }
}
