//! Connections: as many as there may be, none that says nothing, and an end that waits for answers.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::future::{Either, select};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// How long a client may take for the head of a request.
const HEADER_TIME: Duration = Duration::from_secs(15);
/// Bytes of a head.
const HEADER_BYTES: usize = 64 << 10;
/// How long a client that is refused may take to read why: closing at once could reset the connection before.
const CLOSING_TIME: Duration = Duration::from_secs(5);
const FULL: &str = "{\"error\":{\"message\":\"too many connections; come again\",\"type\":\"rate_limit_error\",\"param\":null,\
                    \"code\":null}}";

/// Serves until `stop`; then the answers that have begun are finished.
pub(crate) async fn serve(listener: TcpListener, app: Router, most: usize, stop: impl Future<Output = ()>) {
    let free = Arc::new(Semaphore::new(most.max(1)));
    let graceful = GracefulShutdown::new();
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_buf_size(HEADER_BYTES);
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = match select(stop.as_mut(), std::pin::pin!(listener.accept())).await {
            Either::Left(((), _)) => break,
            Either::Right((accepted, _)) => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors, or a client that is gone already.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(place) = free.clone().try_acquire_owned() else {
            tokio::spawn(refuse(stream));
            continue;
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(app.clone());
        let connection = graceful.watch(server.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    drop(app);
    graceful.shutdown().await;
}

/// Says why, and closes.
async fn refuse(mut stream: TcpStream) {
    let head =
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close";
    let answer = format!("{head}\r\nContent-Length: {}\r\n\r\n{FULL}", FULL.len());
    let _ = tokio::time::timeout(CLOSING_TIME, async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        std::io::Result::Ok(())
    })
    .await;
}
