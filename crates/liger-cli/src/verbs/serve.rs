use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use liger_serve::{Limits, Served};

use crate::common::{DeviceArgs, Loaded, mebibytes};

/// Serve a model over HTTP in OpenAI's form.
#[derive(clap::Args)]
#[command(after_help = "Example: liger serve smollm2-liger --slots 16 --port 8080")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// Adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Texts that are written side by side; their memory is taken at the start
    #[arg(long, default_value_t = 8)]
    slots: usize,
    /// GiB for states, in the place of --slots: as many as fit beside the prefixes
    #[arg(long, value_name = "GIB", conflicts_with = "slots")]
    memory: Option<f64>,
    /// States of prompts' beginnings at hand, such as of a system prompt; their memory is taken at the start too
    #[arg(long, default_value_t = 8)]
    prefixes: usize,
    /// Folder for the states that clients keep (`keep_state`, `/v1/states`); they outlive the server
    #[arg(long, value_name = "FOLDER")]
    states: Option<PathBuf>,
    /// Requests that wait for a slot; more are told to come again
    #[arg(long, default_value_t = 64)]
    queue: usize,
    /// Key that clients must send
    #[arg(long, env = "LIGER_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Serve others than this machine without a key
    #[arg(long)]
    without_key: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Result<()> {
    for (option, value) in [("--slots", args.slots), ("--queue", args.queue)] {
        if value == 0 {
            bail!("{option}: found 0, expected at least 1");
        }
    }
    if args.api_key.as_deref() == Some("") {
        bail!("--api-key: it is empty");
    }
    if !args.host.is_loopback() && args.api_key.is_none() && !args.without_key {
        bail!("--host {}: others than this machine could use it; give --api-key, or --without-key", args.host);
    }
    let Loaded { checkpoint, decoder, adapter } = Loaded::open(&args.model, args.adapter.as_deref(), &args.device)?;
    let name = args.model.file_name().unwrap_or(args.model.as_os_str()).to_string_lossy().into_owned();
    let (limit, device) = (decoder.context_limit(), decoder.ops().describe());
    if limit.is_some() && (args.memory.is_some() || args.states.is_some()) {
        bail!("--memory and --states need a model whose state does not grow: convert it first (`liger linearize`)");
    }
    let bytes = decoder.new_state(1)?.bytes();
    let slots = match args.memory {
        None => args.slots,
        Some(gibibytes) => {
            let fit = (gibibytes * f64::from(1u32 << 30) / bytes as f64) as usize;
            fit.checked_sub(args.prefixes).filter(|&slots| slots > 0).with_context(|| {
                let least = (args.prefixes + 1) * bytes;
                format!("--memory {gibibytes}: one slot and {} prefixes take {}", args.prefixes, mebibytes(least))
            })?
        }
    };
    let fingerprint = checkpoint.fingerprint()?;
    let served = Served { name: name.clone(), fingerprint, decoder, adapter, tokenizer: checkpoint.tokenizer };
    let limits = Limits {
        slots,
        prefixes: args.prefixes,
        queue: args.queue,
        api_key: args.api_key.clone(),
        states: args.states.clone(),
        ..Limits::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let at = (args.host, args.port);
        let listener = tokio::net::TcpListener::bind(at).await.with_context(|| format!("{}:{}", at.0, at.1))?;
        let memory = match limit {
            Some(tokens) => format!("a state that grows, up to {tokens} tokens"),
            None => {
                let prefixes = args.prefixes;
                format!("{slots} and {prefixes} for prefixes of {} each, whatever their length", mebibytes(bytes))
            }
        };
        eprintln!("{name} on {device}; states: {memory}");
        let address = listener.local_addr()?;
        eprintln!("listening on http://{address}/v1, a page to try it on http://{address}; Ctrl-C stops");
        Ok(liger_serve::serve(served, limits, listener, stopped()).await?)
    })
}

/// Ready when the user or the system asks to stop; asked again, the program ends at once.
async fn stopped() {
    asked().await;
    eprintln!("finishing the answers that have begun; Ctrl-C again ends at once");
    tokio::spawn(async {
        asked().await;
        std::process::exit(i32::from(crate::INTERRUPTED));
    });
}

#[cfg(unix)]
async fn asked() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    let interrupt = std::pin::pin!(async move { interrupt.recv().await });
    let terminate = std::pin::pin!(async move { terminate.recv().await });
    futures_util::future::select(interrupt, terminate).await;
}

#[cfg(not(unix))]
async fn asked() {
    let _ = tokio::signal::ctrl_c().await;
}
