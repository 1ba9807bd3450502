//! What is looked up when somebody asks for metrics: what comes to its end first. Waits for nothing.

use std::sync::{Arc, Weak};

use super::Proxy;
use crate::metrics::{self, Refresh};

/// Looks for as long as what is returned is held.
pub(super) fn refresh(proxy: &Arc<Proxy>) -> Refresh {
    let proxy = Arc::downgrade(proxy);
    metrics::refreshed_by(move || {
        let Some(proxy) = Weak::upgrade(&proxy) else { return };
        metrics::CERTIFICATE_EXPIRY.clear();
        for (certificate, ends) in proxy.state.current().first_endings() {
            metrics::CERTIFICATE_EXPIRY.of([certificate]).set(ends.as_second());
        }
    })
}
