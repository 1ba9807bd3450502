//! `caponier kubeconfig`: a context for kubectl behind an agent.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf, absolute};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ArgGroup;

use super::{Exit, ExitWith, print, running};
use crate::client::kubeconfig::{self, Credentials, Proxy, Server, Wanted};
use crate::identity::AgentName;
use crate::limits;
use crate::target::Host;

/// Write a context for kubectl, helm and Terraform whose API server is behind an agent, reached by way of
/// `caponier forward --http-proxy`.
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("credentials").args(["client_certificate", "token_file", "exec", "user"])),
    after_help = "\
Example:
  caponier kubeconfig acme/prod-eu --server https://api.internal:6443 --certificate-authority cluster-ca.pem \\
      --client-certificate me.pem --client-key me.key --context prod
  caponier forward --gateway ssh://gateway.example.com --agent acme/prod-eu --identity ~/.ssh/provisioner \\
      --known-hosts ~/.ssh/known_hosts --http-proxy 8118 -- kubectl --context prod get pods

The cluster, the user and the context of that name go where kubectl would write them: into the file of --kubeconfig, else into \
the first one of KUBECONFIG that exists, else into ~/.kube/config. What is there already stays as it is, save for comments, \
which kubectl does not keep either; an entry of the same name that says something else is not replaced without --overwrite. \
With the same arguments again, nothing changes.

Only a proxy on loopback is taken, and none of https://. kubectl has one set of certificate authorities for the proxy and the \
API server, and shows its client certificate to both; so whoever may vouch for such a proxy could stand for the API server. \
The authority of the cluster therefore stands alone in the file, and TLS goes from kubectl to the API server."
)]
pub struct Args {
    /// The agent behind which the API server is.
    #[arg(value_name = "ORG/AGENT")]
    agent: AgentName,
    /// The API server, as the agent reaches it.
    #[arg(long, value_name = "https://HOST[:PORT]")]
    server: Server,
    /// The name in the API server's certificate, where it is not HOST.
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<Host>,
    /// The authority of the API server's certificate, in PEM; it is copied. Left out, those of the system count.
    #[arg(long, value_name = "FILE")]
    certificate_authority: Option<PathBuf>,
    /// The loopback listener of `caponier forward`.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8118")]
    proxy_url: String,
    /// Your client certificate, in PEM; it stays where it is.
    #[arg(long, value_name = "FILE", requires = "client_key")]
    client_certificate: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", requires = "client_certificate")]
    client_key: Option<PathBuf>,
    /// A file with your token; it stays where it is.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// A program that gets you credentials (client.authentication.k8s.io/v1).
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// An argument for that program. May be given several times.
    #[arg(long, value_name = "WORD", requires = "exec", allow_hyphen_values = true)]
    exec_arg: Vec<String>,
    /// A user that is in the file already. Without this and all of the above, the user of the context's name is taken as it is,
    /// and made without credentials if it is not there.
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// What the context, the cluster and the user are called; ORG/AGENT unless given.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Make it the current context.
    #[arg(long)]
    set_current: bool,
    /// Replace entries of that name.
    #[arg(long)]
    overwrite: bool,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// If a file cannot be used, or an entry is there that says something else.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let paths = kubeconfig::files(
        args.kubeconfig,
        std::env::var_os("KUBECONFIG").as_deref(),
        std::env::var_os("HOME").as_deref().map(Path::new).filter(|home| home.is_absolute()),
    );
    // Not by clap, which repeats what it does not take, and there may be a password in it.
    let proxy = args.proxy_url.parse::<Proxy>().context("--proxy-url").exit_with(Exit::Usage)?;
    if paths.is_empty() {
        return Err(anyhow::anyhow!("there is no home directory: name a file with --kubeconfig"))
            .exit_with(Exit::Usage);
    }
    // kubectl takes relative ones from where the file is.
    let whole = |path: PathBuf| absolute(&path).with_context(|| format!("{} is no path", path.display()));
    let credentials = match (args.client_certificate, args.client_key, args.token_file, args.exec, args.user) {
        (Some(certificate), Some(key), ..) => {
            Some(Credentials::Certificate { certificate: whole(certificate)?, key: whole(key)? })
        }
        (_, _, Some(file), ..) => Some(Credentials::TokenFile(whole(file)?)),
        (.., Some(command), _) => Some(Credentials::Exec { command, arguments: args.exec_arg }),
        (.., Some(user)) => Some(Credentials::User(user)),
        _ => None,
    };
    let name = args.context.unwrap_or_else(|| args.agent.to_string());
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(anyhow::anyhow!("a context has a name without control characters")).exit_with(Exit::Usage);
    }
    let wanted = Wanted {
        name: name.clone(),
        agent: args.agent,
        server: args.server,
        server_name: args.tls_server_name,
        authority: args.certificate_authority.as_deref().map(read).transpose().exit_with(Exit::Usage)?,
        proxy,
        credentials,
        set_current: args.set_current,
        overwrite: args.overwrite,
    };
    let changed =
        running::block_on(async |stop| match stop.run_until_cancelled(kubeconfig::merge(&paths, &wanted)).await {
            Some(changed) => Ok(changed?),
            None => bail!("stopped before anything was written"),
        })?;
    match changed.is_empty() {
        true => print(&format!("context {name} is there already\n"))?,
        false => {
            let files: Vec<String> = changed.iter().map(|path| path.display().to_string()).collect();
            print(&format!("wrote context {name} to {}\n", files.join(", ")))?;
        }
    }
    Ok(Exit::Done.into())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let reading = || format!("could not read {}", path.display());
    let mut bytes = Vec::new();
    File::open(path).with_context(reading)?.take(limits::FILE_MAX + 1).read_to_end(&mut bytes).with_context(reading)?;
    if bytes.len() as u64 > limits::FILE_MAX {
        bail!("{} is longer than {} bytes", path.display(), limits::FILE_MAX);
    }
    Ok(bytes)
}
