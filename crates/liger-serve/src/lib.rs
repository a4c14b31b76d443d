//! Serves a model in OpenAI's form over HTTP.
//!
//! One thread (`engine`) owns the model and a state of a fixed number of slots, allocated at the start: memory does not
//! grow with texts or their lengths (of a Liger model). Requests wait in a bounded queue; a text takes a free slot, begins from a
//! kept state or from the longest beginning of its prompt that is at hand (`prefixes`), is read chunk by chunk between the others'
//! steps, writes one token a step together with all others, and leaves when it ends, stops, or its client goes away. HTTP handlers
//! (`api`) hand work to that thread and pass on the text that comes back.

mod api;
mod connections;
mod engine;
mod error;
mod metrics;
mod prefixes;
mod running;
mod scores;
mod states;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use liger_model::{Adapter, Decoder, Generator, Tokenizer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

pub use api::check_body;
pub use error::Error;

/// A model to serve.
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// Tells its states from those of other models.
    pub fingerprint: String,
    /// The model.
    pub decoder: Decoder,
    /// Its adapter.
    pub adapter: Option<Adapter>,
    /// Its tokenizer, with the chat template if there is one.
    pub tokenizer: Tokenizer,
}

/// Limits of a server.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Texts that are written side by side.
    pub slots: usize,
    /// States of prompts' beginnings at hand; only of models whose state does not grow.
    pub prefixes: usize,
    /// Requests that wait for a slot; more are told to come again.
    pub queue: usize,
    /// Bytes of a request.
    pub body: usize,
    /// Connections that are open at a time; more are told to come again.
    pub connections: usize,
    /// What clients must send as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// Folder of the states that clients keep; none are kept without. Only of models whose state does not grow.
    pub states: Option<PathBuf>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { slots: 8, prefixes: 8, queue: 64, body: 4 << 20, connections: 1024, api_key: None, states: None }
    }
}

/// Serves until `stop` is ready; answers that have begun are finished.
///
/// # Errors
/// [`Error::Model`] if the state's memory cannot be had, [`Error::Io`] if the listener or the folder of states fails.
pub async fn serve(
    served: Served,
    limits: Limits,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (work, queue) = mpsc::channel(limits.queue.max(1));
    let Served { name, fingerprint, decoder, adapter, tokenizer } = served;
    let tokenizer = Arc::new(tokenizer);
    let has_fixed_states = decoder.context_limit().is_none();
    let states = match limits.states.filter(|_| has_fixed_states) {
        Some(folder) => Some(Arc::new(states::States::new(&folder, fingerprint)?)),
        None => None,
    };
    let mut state = decoder.new_state(limits.slots.max(1))?;
    let prefixes = if has_fixed_states { limits.prefixes } else { 0 };
    let prefixes = prefixes::Prefixes::new(&decoder, prefixes, engine::CHUNK)?;
    Generator { decoder: &decoder, adapter: adapter.as_ref() }.warm_up(&mut state, engine::CHUNK)?;
    let metrics = Arc::new(metrics::Metrics::default());
    metrics.slots.store(state.slots() as u64, Ordering::Relaxed);
    metrics.state_bytes.store((state.bytes() + prefixes.bytes()) as u64, Ordering::Relaxed);
    let stop_ids = decoder.config().eos_token_ids.clone();
    let app = api::App {
        name,
        decoder: Arc::new(decoder.clone()),
        tokenizer: tokenizer.clone(),
        stop_ids,
        work,
        api_key: limits.api_key,
        states,
        metrics: metrics.clone(),
    };
    let engine = engine::Engine { decoder, adapter, tokenizer, state, prefixes, queue, metrics };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;
    connections::serve(listener, api::router(app, limits.body), limits.connections, stop).await;
    // The last sender of work is gone with the router: the thread ends.
    let _ = thread.join();
    Ok(())
}
