//! As much of HTTP/1.1 (RFC 9112) as a read-only gateway speaks: requests without a body, answers of a known length, one after
//! another on a connection.
//!
//! Bounds: the size of a request's head and the time that it may take; the time that a client may take for one piece of an
//! answer, of which a connection holds one. What could be read in two ways is refused and the connection closed.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Largest head of a request: clients send a few hundred bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Most header fields of a request.
const FIELDS_MAX: usize = 64;
/// How long the head of a request may take, the pause since the last answer included.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// How long a client may take for one piece of an answer.
const PIECE_WAIT: Duration = Duration::from_secs(60);

/// What is done with a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// Sent.
    Get,
    /// Described.
    Head,
}

/// A request's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// Without the query.
    pub(crate) path: String,
    fields: Vec<(String, String)>,
    /// Whether another request may follow on the connection.
    is_last: bool,
}

impl Request {
    /// A field's value; field names are in lower case.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let mut fields = self.fields.iter();
        let found = fields.find(|(found, _)| found == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Why a connection is closed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// Too slow.
    #[error("the other side took more than {} s", .0.as_secs())]
    Late(Duration),
    /// Not a request that is answered here.
    #[error("{reason}")]
    Refused {
        /// The status to answer with.
        status: Status,
        /// What is wrong.
        reason: &'static str,
    },
}

/// How a request was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok = 200,
    PartialContent = 206,
    NotModified = 304,
    BadRequest = 400,
    NotFound = 404,
    MethodNotAllowed = 405,
    RangeNotSatisfiable = 416,
    HeadTooLarge = 431,
    BadGateway = 502,
    ServiceUnavailable = 503,
}

impl Status {
    fn reason(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::PartialContent => "Partial Content",
            Self::NotModified => "Not Modified",
            Self::BadRequest => "Bad Request",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::RangeNotSatisfiable => "Range Not Satisfiable",
            Self::HeadTooLarge => "Request Header Fields Too Large",
            Self::BadGateway => "Bad Gateway",
            Self::ServiceUnavailable => "Service Unavailable",
        }
    }
}

/// The head of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    /// Fields besides the length and what concerns the connection.
    pub(crate) fields: Vec<(&'static str, String)>,
}

impl Answer {
    pub(crate) fn new(status: Status) -> Self {
        let fields = Vec::new();
        Self { status, fields }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((name, value.into()));
        self
    }
}

/// A connection to a client.
#[derive(Debug)]
pub(crate) struct Conversation<S> {
    stream: S,
    /// What was read and not yet used: a client may send its next request early.
    read: Vec<u8>,
    is_over: bool,
    /// Whether the answer under way is described only.
    is_head: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Conversation<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            read: Vec::new(),
            is_over: false,
            is_head: false,
        }
    }

    /// The next request; `None` when the client has no more.
    ///
    /// # Errors
    /// When none comes in time, or what comes is not one. Such a client was told so.
    pub(crate) async fn next(&mut self) -> Result<Option<Request>, HttpError> {
        if self.is_over {
            return Ok(None);
        }
        let read = timeout(HEAD_WAIT, self.read_head()).await;
        let request = match read.map_err(|_| HttpError::Late(HEAD_WAIT))? {
            Err(HttpError::Refused { status, reason }) => {
                (self.is_over, self.is_head) = (true, false);
                let mut answer = Answer::new(status);
                if status == Status::MethodNotAllowed {
                    answer = answer.with("Allow", "GET, HEAD");
                }
                self.start(&answer, reason.len() as u64).await?;
                self.send(Bytes::from_static(reason.as_bytes())).await?;
                return Err(HttpError::Refused { status, reason });
            }
            read => read?,
        };
        if let Some(request) = &request {
            self.is_over = request.is_last;
            self.is_head = request.method == Method::Head;
        }
        Ok(request)
    }

    async fn read_head(&mut self) -> Result<Option<Request>, HttpError> {
        loop {
            if let Some((request, length)) = parse(&self.read)? {
                self.read.drain(..length);
                return Ok(Some(request));
            }
            if self.read.len() >= HEAD_BYTES_MAX {
                let (status, reason) = (Status::HeadTooLarge, "the request's head is too large");
                return Err(HttpError::Refused { status, reason });
            }
            let room = HEAD_BYTES_MAX - self.read.len();
            let mut limited = (&mut self.stream).take(room as u64);
            if limited.read_buf(&mut self.read).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Sends the head of an answer whose body has so many bytes.
    ///
    /// # Errors
    /// When the client does not take it.
    pub(crate) async fn start(&mut self, answer: &Answer, bytes: u64) -> Result<(), HttpError> {
        let status = answer.status;
        let mut head = format!("HTTP/1.1 {} {}\r\n", status as u16, status.reason());
        for (name, value) in &answer.fields {
            // A line break in a value would begin another field.
            let value: String = value.chars().filter(|c| matches!(c, ' '..='~')).collect();
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if status != Status::NotModified {
            head.push_str(&format!("Content-Length: {bytes}\r\n"));
        }
        let next = if self.is_over { "close" } else { "keep-alive" };
        head.push_str(&format!("Connection: {next}\r\n\r\n"));
        self.write(head.as_bytes()).await
    }

    /// Sends a piece of the body, unless it was only to be described.
    ///
    /// # Errors
    /// When the client does not take it in time.
    pub(crate) async fn send(&mut self, piece: Bytes) -> Result<(), HttpError> {
        if self.is_head {
            return Ok(());
        }
        self.write(&piece).await
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), HttpError> {
        let written = timeout(PIECE_WAIT, self.stream.write_all(bytes)).await;
        Ok(written.map_err(|_| HttpError::Late(PIECE_WAIT))??)
    }
}

/// A request at the start of `bytes` and its length; `None` while it is not whole.
fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, HttpError> {
    let refused = |status, reason| HttpError::Refused { status, reason };
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Request::new(&mut fields);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let reason = "the request has too many header fields";
            return Err(refused(Status::HeadTooLarge, reason));
        }
        Err(_) => return Err(refused(Status::BadRequest, "this is no HTTP/1 request")),
    };
    let method = match head.method {
        Some("GET") => Method::Get,
        Some("HEAD") => Method::Head,
        _ => {
            let reason = "only GET and HEAD are answered here";
            return Err(refused(Status::MethodNotAllowed, reason));
        }
    };
    let path = head.path.unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default().to_owned();
    let mut fields = Vec::with_capacity(head.headers.len());
    for field in head.headers.iter() {
        // Nothing that is asked here by a field is outside ASCII.
        let value = String::from_utf8_lossy(field.value).trim().to_owned();
        fields.push((field.name.to_ascii_lowercase(), value));
    }
    let mut request = Request {
        method,
        path,
        fields,
        is_last: head.version != Some(1),
    };
    let has_body = request.field("transfer-encoding").is_some()
        || request
            .field("content-length")
            .is_some_and(|length| length != "0");
    if has_body {
        let reason = "a request here has no body";
        return Err(refused(Status::BadRequest, reason));
    }
    let connection = request.field("connection").unwrap_or_default();
    request.is_last |= connection.to_ascii_lowercase().contains("close");
    Ok(Some((request, length)))
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// What is answered to `sent`, each request with `body`.
    async fn talk(sent: &[u8], body: &'static str) -> (String, Vec<Request>) {
        let (near, mut far) = duplex(1 << 16);
        far.write_all(sent).await.unwrap();
        let (mut reader, writer) = tokio::io::split(far);
        let mut requests = Vec::new();
        {
            let mut conversation = Conversation::new(near);
            // The end of what is sent, so that the conversation ends.
            let mut writer = writer;
            writer.shutdown().await.unwrap();
            while let Ok(Some(request)) = conversation.next().await {
                requests.push(request);
                let answer = Answer::new(Status::Ok).with("ETag", "\"a\r\nb\"");
                conversation
                    .start(&answer, body.len() as u64)
                    .await
                    .unwrap();
                conversation
                    .send(Bytes::from_static(body.as_bytes()))
                    .await
                    .unwrap();
            }
        }
        let mut said = String::new();
        reader.read_to_string(&mut said).await.unwrap();
        (said, requests)
    }

    #[tokio::test]
    async fn requests_on_one_connection_are_answered_in_order() {
        let sent = b"GET /a?b=c HTTP/1.1\r\nRange: bytes=0-1\r\n\r\nHEAD /d HTTP/1.1\r\nConnection: close\r\n\r\nGET /e HTTP/1.1\r\n\r\n";
        let (said, requests) = talk(sent, "body").await;
        let paths: Vec<&str> = requests
            .iter()
            .map(|request| request.path.as_str())
            .collect();
        assert_eq!(paths, ["/a", "/d"], "what follows the last one is not read");
        assert_eq!(requests[0].field("range"), Some("bytes=0-1"));
        let expected = "HTTP/1.1 200 OK\r\nETag: \"ab\"\r\nContent-Length: 4\r\nConnection: keep-alive\r\n\r\nbody\
                        HTTP/1.1 200 OK\r\nETag: \"ab\"\r\nContent-Length: 4\r\nConnection: close\r\n\r\n";
        assert_eq!(said, expected);
    }

    #[tokio::test]
    async fn what_is_no_plain_request_is_refused_and_the_connection_closed() {
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(20_000));
        for (sent, status) in [
            ("POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405"),
            ("GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "400"),
            (
                "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                "400",
            ),
            ("GET / HTTP/1.1\r\nbad field\r\n\r\n", "400"),
            ("\u{0}\u{1}\u{2}", "400"),
            ("GET / HTTP/2.0\r\n\r\n", "400"),
            (&many, "431"),
            (&long, "431"),
        ] {
            let (said, requests) = talk(sent.as_bytes(), "").await;
            assert!(requests.is_empty(), "{sent:.40}");
            assert!(
                said.starts_with(&format!("HTTP/1.1 {status} ")),
                "{sent:.40}: {said}"
            );
            assert!(said.contains("Connection: close"), "{said}");
        }
    }

    #[tokio::test]
    async fn a_client_that_goes_away_or_speaks_an_older_version_gets_no_second_answer() {
        assert!(talk(b"", "").await.1.is_empty());
        assert!(talk(b"GET / HT", "").await.1.is_empty());
        let (_, requests) = talk(b"GET / HTTP/1.0\r\n\r\nGET / HTTP/1.0\r\n\r\n", "").await;
        assert_eq!(requests.len(), 1);
    }
}
