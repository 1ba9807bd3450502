//! What the system knows of this process, under the names that all exporters use.

use std::sync::LazyLock;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Reads `/proc` each time it is asked. What cannot be read is left out.
#[derive(Debug)]
pub(super) struct Process;

static STARTED: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);

/// Notes the time, once.
pub(super) fn started() {
    LazyLock::force(&STARTED);
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        let started = STARTED.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        gauge(
            "process_start_time",
            "When this process started, in seconds since 1970.",
            SECONDS,
            started.as_secs_f64(),
        )?;
        if let Some((resident, virtual_, threads)) = memory() {
            gauge("process_resident_memory", "Memory of this process that is in use.", BYTES, resident)?;
            gauge("process_virtual_memory", "Addresses that this process has mapped.", BYTES, virtual_)?;
            gauge("process_threads", "Threads of this process.", None, threads)?;
        }
        // One of them is the directory that is being read.
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            gauge(
                "process_open_fds",
                "Descriptors that this process has open.",
                None,
                open.count().saturating_sub(1) as f64,
            )?;
        }
        if let Some(most) = getrlimit(Resource::Nofile).current {
            gauge("process_max_fds", "Descriptors that this process may have open.", None, most as f64)?;
        }
        let spent = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = ConstCounter::new(spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9);
        let help = "Processor time that this process has used.";
        cpu.encode(encoder.encode_descriptor("process_cpu", help, SECONDS, cpu.metric_type())?)
    }
}

const SECONDS: Option<&Unit> = Some(&Unit::Seconds);
const BYTES: Option<&Unit> = Some(&Unit::Bytes);

/// Resident and virtual memory in bytes, and threads.
fn memory() -> Option<(f64, f64, f64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let rest = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some((field("VmRSS")? * 1024.0, field("VmSize")? * 1024.0, field("Threads")?))
}
