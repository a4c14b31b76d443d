//! A real server on a loopback port with a tiny random model.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use liger_cpu::Cpu;
use liger_model::{Decoder, LigerConfig, ModelConfig, RandomWeights, Structure, Tokenizer, Weights};
use liger_serve::{Limits, Served, serve};
use liger_tensor::{DType, Ops};
use serde_json::Value;

pub fn decoder() -> Decoder {
    let ops: Arc<dyn Ops> = Arc::new(Cpu::new());
    let config = ModelConfig::shape("tiny").unwrap();
    let weights = Weights::load(&RandomWeights::new(&config, 3), &config, &*ops, DType::F32).unwrap();
    Decoder::new(ops, config, weights).with_attention(Some(LigerConfig::paper(Structure::Gsa)))
}

pub struct Server {
    pub address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    pub fn start(limits: Limits) -> Self {
        Self::with_model(decoder(), limits)
    }

    pub fn with_model(decoder: Decoder, limits: Limits) -> Self {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (name, fingerprint) = ("tiny".into(), "the tiny one".into());
            let served = Served { name, fingerprint, decoder, adapter: None, tokenizer: Tokenizer::bytes() };
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                serve(served, limits, listener, async { drop(stopped.await) }).await.unwrap();
            });
        });
        Self { address: told.recv().unwrap(), stop: Some(stop), thread: Some(thread) }
    }

    pub fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let length = body.len();
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        );
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// Status, head and body.
    pub fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
        let mut text = String::new();
        self.send(method, path, headers, body).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
    }

    pub fn complete(&self, request: &Value) -> (u16, Value) {
        let (status, _, body) = self.ask("POST", "/v1/completions", "", &request.to_string());
        (status, serde_json::from_str(&body).unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        let _ = self.thread.take().unwrap().join();
    }
}
