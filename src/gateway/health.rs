//! Whether the gateway can be used. Agents that are not linked are not its fault: `caponier agents` tells of them.

use std::sync::PoisonError;

use super::Gateway;
use crate::audit::Culprit;
use crate::health::{Part, State};

impl State for Gateway {
    fn side(&self) -> &'static str {
        "gateway"
    }

    async fn parts(&self) -> Vec<Part> {
        let accepting = self.accepting.now();
        let listeners = match accepting {
            // That they accept nothing in a drain is told there.
            0 if self.drain.since().is_none() => {
                Part::failing("listeners", "nothing is accepted", "restart it, and report what its log says")
            }
            _ => Part::ready("listeners"),
        };
        // There was a good state at the start, and it stays in force.
        let mut registry = Part::ready("registry");
        if let Some(at) = *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) {
            registry.detail =
                format!("what was changed at {at} has faults, and is not in force; the state before it is");
            registry.advice = "mend the registry; the log names the faults".to_owned();
        }
        vec![
            listeners,
            registry,
            Part::trail(*self.trail.failed().borrow(), self.trail.culprit().as_ref().map(Culprit::words)),
            Part::drain(self.drain.since()),
        ]
    }
}
