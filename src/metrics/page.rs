//! What a scraper is given: OpenMetrics, or the older text format that all of them read.

use super::encode;

/// A page of metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// What it is, for the header `Content-Type`.
    pub content_type: &'static str,
    /// The page.
    pub body: String,
}

/// The content type of OpenMetrics.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The content type of the text format.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Everything that is counted, in the format that the header `Accept` asks for: OpenMetrics where it is named, else text.
#[must_use]
pub fn page(accept: Option<&str>) -> Page {
    if accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
        return Page { content_type: OPENMETRICS, body: encode() };
    }
    Page { content_type: TEXT, body: plain(&encode()) }
}

/// The same in the text format: there a counter is named as its samples are, and units and the end are not said.
fn plain(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut lines = openmetrics.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("# UNIT ") || line == "# EOF" {
            continue;
        }
        // The type comes right after the help text.
        let counter = |line: &str| line.starts_with("# TYPE ") && line.ends_with(" counter");
        let described = line.starts_with("# HELP ") && lines.peek().is_some_and(|next| counter(next));
        let mut words = line.splitn(4, ' ');
        match (described || counter(line), words.next(), words.next(), words.next(), words.next()) {
            (true, Some(mark), Some(kind), Some(name), Some(rest)) => {
                text.extend([mark, " ", kind, " ", name, "_total ", rest, "\n"]);
            }
            _ => text.extend([line, "\n"]),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_format_names_counters_by_their_samples() {
        let openmetrics = "# HELP a_bytes All of a.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\na_bytes_total{x=\"# EOF\"} 1\n\
            # HELP b What b is.\n# TYPE b gauge\nb 2\n# EOF\n";
        let text = "# HELP a_bytes_total All of a.\n# TYPE a_bytes_total counter\na_bytes_total{x=\"# EOF\"} 1\n\
            # HELP b What b is.\n# TYPE b gauge\nb 2\n";
        assert_eq!(plain(openmetrics), text);
    }

    #[test]
    fn a_scraper_gets_what_it_asks_for() {
        for (accept, content_type) in [
            (None, TEXT),
            (Some("*/*"), TEXT),
            (Some("text/plain;version=0.0.4"), TEXT),
            (Some("application/openmetrics-text;version=1.0.0,text/plain;q=0.5"), OPENMETRICS),
        ] {
            let page = page(accept);
            assert_eq!(page.content_type, content_type, "{accept:?}");
            assert_eq!(page.body.ends_with("# EOF\n"), content_type == OPENMETRICS, "{accept:?}");
        }
    }
}
