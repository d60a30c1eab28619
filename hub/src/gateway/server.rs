//! Client connections: bounded in number, in the size of requests and in time.
//!
//! A connection that could stay for ever is closed: a client that does not finish its request's head, or reads no response.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Largest head of a request: clients send a few hundred bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Most header fields of a request.
const FIELDS_MAX: usize = 64;
/// Longest wait for the head of a request, from the last response on.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// Longest time in which a client reads no byte of a response.
const TAKE_WAIT: Duration = Duration::from_secs(60);
/// Pause after the system refused a connection, for example for lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves at most `connections_max` connections at once on `listener`, until `shutdown`. Others wait in the system's queue.
pub(super) async fn serve(
    router: Router,
    listener: TcpListener,
    connections_max: usize,
    shutdown: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    let tracker = TaskTracker::new();
    loop {
        let admitted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            admitted = admit(&listener, &places) => admitted,
        };
        match admitted {
            Ok((stream, place)) => {
                let talk = converse(stream, router.clone());
                let ended = shutdown.clone().cancelled_owned();
                tracker.spawn(async move {
                    tokio::select! {
                        talked = talk => if let Err(error) = talked {
                            tracing::debug!(%error, "a connection ended");
                        },
                        () = ended => {}
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "no connection can be taken");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    tracker.close();
    tracker.wait().await;
}

/// # Cancel safety
/// A cancelled call drops at most one new connection.
async fn admit(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await?;
    let (stream, _) = listener.accept().await.context("accept")?;
    stream.set_nodelay(true)?;
    Ok((stream, place))
}

/// Serves one client until it closes the connection or breaks a bound.
async fn converse<S>(stream: S, router: Router) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(TAKE_WAIT));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WAIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(
            TokioIo::new(Box::pin(stream)),
            TowerToHyperService::new(router),
        )
        .await
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::Instant;

    use super::*;

    fn router() -> Router {
        let large = || async { vec![b'x'; 1 << 20] };
        Router::new()
            .route("/", get(async || "body"))
            .route("/large", get(large))
    }

    /// A client's end of a connection, and the conversation at the other.
    fn client() -> (DuplexStream, impl Future<Output = hyper::Result<()>>) {
        let (near, far) = duplex(1 << 16);
        (near, converse(far, router()))
    }

    /// What is answered to `sent`, after which the client only listens, until the other side ends it.
    async fn talk(sent: &[u8]) -> String {
        let (mut client, conversation) = client();
        let talking = async {
            client.write_all(sent).await.unwrap();
            let mut said = String::new();
            client.read_to_string(&mut said).await.unwrap();
            said
        };
        tokio::join!(talking, conversation).0
    }

    #[tokio::test(start_paused = true)]
    async fn requests_on_one_connection_are_answered_in_order_until_the_last() {
        let said = talk(
            b"GET /?b=c HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        )
        .await;
        let answers: Vec<&str> = said.split("HTTP/1.1 200 OK\r\n").skip(1).collect();
        assert_eq!(answers.len(), 2, "{said}");
        assert!(answers[0].contains("content-length: 4") && answers[0].ends_with("body"));
        assert!(answers[1].contains("content-length: 4") && answers[1].ends_with("\r\n\r\n"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_plain_request_is_refused_and_the_connection_closed() {
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        let long = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(20_000));
        for (sent, status) in [
            ("POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405"),
            ("GET / HTTP/1.1\r\nbad field\r\n\r\n", "400"),
            ("\u{0}\u{1}\u{2}\r\n\r\n", "400"),
            (&many, "431"),
            (&long, "431"),
        ] {
            let said = talk(sent.as_bytes()).await;
            let expected = format!("HTTP/1.1 {status} ");
            assert!(said.starts_with(&expected), "{sent:.40}: {said}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_not_taken_for_the_next_request() {
        for length in [
            "Content-Length: 23",
            "Content-Length: 5\r\nTransfer-Encoding: chunked",
        ] {
            let hidden = format!("GET / HTTP/1.1\r\n{length}\r\n\r\nGET /large HTTP/1.1\r\n\r\n");
            let said = talk(hidden.as_bytes()).await;
            assert_eq!(said.matches("HTTP/1.1 200 OK").count(), 1, "{said}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_come_ends_the_connection() {
        for sent in ["", "GET / HT", "GET / HTTP/1.1\r\n\r\n"] {
            let (mut client, conversation) = client();
            let begun = Instant::now();
            client.write_all(sent.as_bytes()).await.unwrap();
            conversation.await.ok();
            assert!(begun.elapsed() < 2 * HEAD_WAIT, "{sent:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_cut_off_and_one_that_takes_slowly_is_not() {
        let asks = b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n";
        let (mut stuck, conversation) = client();
        stuck.write_all(asks).await.unwrap();
        let begun = Instant::now();
        assert!(conversation.await.is_err());
        assert!(begun.elapsed() < 2 * TAKE_WAIT);

        let (mut slow, conversation) = client();
        slow.write_all(asks).await.unwrap();
        let taking = async {
            let (mut taken, mut piece) = (0, vec![0; 1 << 16]);
            loop {
                tokio::time::sleep(TAKE_WAIT / 2).await;
                match slow.read(&mut piece).await.unwrap() {
                    0 => return taken,
                    some => taken += some,
                }
            }
        };
        let (taken, ended) = tokio::join!(taking, conversation);
        ended.unwrap();
        assert!(taken > 1 << 20, "{taken}");
    }
}
