//! Refusals of requests, with the codes that hubs' clients distinguish.

use axum::Json;
use axum::http::StatusCode;
use axum::http::header::{HeaderName, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::version_cache::Absent;

/// `Retry-After` for a version that is being prepared, in seconds.
const RETRY_SECONDS: &str = "5";
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");

#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("this gateway serves another run: see /")]
    OtherRun,
    #[error(transparent)]
    Absent(#[from] Absent),
    #[error("the version has no such file")]
    NoFile,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, code) = match &self {
            Self::OtherRun => (StatusCode::NOT_FOUND, "RepoNotFound"),
            Self::Absent(Absent::Unknown) => (StatusCode::NOT_FOUND, "RevisionNotFound"),
            Self::Absent(Absent::NotYet) => (StatusCode::SERVICE_UNAVAILABLE, "NotYet"),
            Self::Absent(Absent::Refused(_)) => (StatusCode::BAD_GATEWAY, "Refused"),
            Self::NoFile => (StatusCode::NOT_FOUND, "EntryNotFound"),
        };
        let said = self.to_string();
        // A line break would begin another header.
        let shown: String = said.chars().filter(|c| matches!(c, ' '..='~')).collect();
        let fields = [(ERROR_CODE, code.to_owned()), (ERROR_MESSAGE, shown)];
        let body = Json(json!({ "error": said }));
        match status {
            StatusCode::SERVICE_UNAVAILABLE => {
                (status, fields, [(RETRY_AFTER, RETRY_SECONDS)], body).into_response()
            }
            _ => (status, fields, body).into_response(),
        }
    }
}
