//! Serves a model in OpenAI's form over HTTP.
//!
//! One thread ([`engine`](self)) owns the model and a state of a fixed number of slots, allocated at the start: memory does not
//! grow with texts or their lengths (of a Liger model). Requests wait in a bounded queue; a text takes a free slot, is read chunk
//! by chunk between the others' steps, writes one token a step together with all others, and leaves when it ends, stops, or its
//! client goes away. HTTP handlers hand work to that thread and pass on the text that comes back.

mod api;
mod engine;
mod error;
mod scores;

use std::future::Future;
use std::sync::Arc;

use liger_model::{Adapter, Decoder, Tokenizer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

pub use error::Error;

/// A model to serve.
pub struct Served {
    /// What clients call it.
    pub name: String,
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
    /// Requests that wait for a slot; more are told to come again.
    pub queue: usize,
    /// Bytes of a request.
    pub body: usize,
    /// What clients must send as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { slots: 8, queue: 64, body: 4 << 20, api_key: None }
    }
}

/// Serves until `stop` is ready; answers that have begun are finished.
///
/// # Errors
/// [`Error::Model`] if the state's memory cannot be had, [`Error::Io`] if the listener fails.
pub async fn serve(
    served: Served,
    limits: Limits,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (work, queue) = mpsc::channel(limits.queue.max(1));
    let Served { name, decoder, adapter, tokenizer } = served;
    let tokenizer = Arc::new(tokenizer);
    let stop_ids = decoder.config().eos_token_ids.clone();
    let state = decoder.new_state(limits.slots.max(1))?;
    let engine = engine::Engine { decoder, adapter, tokenizer: tokenizer.clone(), state, queue };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;
    let app = api::router(api::App { name, tokenizer, stop_ids, work, api_key: limits.api_key }, limits.body);
    axum::serve(listener, app).with_graceful_shutdown(stop).await?;
    // The last sender of work is gone with the router: the thread ends.
    let _ = thread.join();
    Ok(())
}
