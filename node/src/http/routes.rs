//! The routes: what each answers, and what every answer bears.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use manyhands_core::swarm::ledger::Record;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;

use super::error::ApiError;
use super::feed::StepLine;
use super::{AdminAction, AdminCommand, HttpState, blobs, metrics, p2p};

/// Most records, steps or evaluations in one answer.
pub const PAGE_MAX: usize = 1000;
/// The same, when the caller does not say.
const PAGE_DEFAULT: usize = 200;
/// Largest body of a request. No route needs one.
pub const BODY_BYTES_MAX: usize = 4 << 10;
/// In which a route begins its answer.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// In which the coordination peer takes a command of the operator.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Only this program's own scripts, styles and data; nobody may frame the page.
const CONTENT_SECURITY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A route, as `/api` lists it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Route {
    /// Method.
    pub method: &'static str,
    /// Path; what is in braces varies.
    pub path: &'static str,
    /// What it does.
    pub does: &'static str,
}

const fn route(method: &'static str, path: &'static str, does: &'static str) -> Route {
    Route { method, path, does }
}

/// Every route.
pub const ROUTES: &[Route] = &[
    route("GET", "/", "the dashboard"),
    route("GET", "/api", "this list"),
    route("GET", "/api/status", "the run and its volunteers now"),
    route("GET", "/api/manifest", "what a volunteer needs to join"),
    route("GET", "/api/ledger", "records in order: ?from=SEQUENCE&limit=COUNT, at most 1000"),
    route("GET", "/api/blobs/{hash}", "bytes of a hash; ranges are served"),
    route("GET", "/api/steps", "numbers of past steps: ?from=ORDINAL&limit=COUNT, at most 1000"),
    route("GET", "/api/evaluations", "past evaluations: ?from=ORDINAL&limit=COUNT, at most 1000"),
    route("GET", "/api/events", "what happens from now on, as server-sent events"),
    route("GET", "/p2p", "the swarm, for tabs: a WebSocket connection to this host's libp2p"),
    route("GET", "/metrics", "OpenMetrics text for Prometheus"),
    route("POST", "/api/admin/pause", "hand out nothing new; needs the operator's token"),
    route("POST", "/api/admin/resume", "go on; needs the operator's token"),
    route("POST", "/api/admin/stop", "save and end the program; needs the operator's token"),
];

/// All routes of a coordination peer.
pub fn router(state: HttpState) -> Router {
    let script = || async { asset("text/javascript", include_str!("assets/dashboard.js")) };
    let charts = || async { asset("text/javascript", include_str!("assets/charts.js")) };
    let style = || async { asset("text/css", include_str!("assets/dashboard.css")) };
    let page = || async { asset("text/html", include_str!("assets/dashboard.html")) };
    Router::new()
        .route("/", get(page))
        .route("/assets/dashboard.js", get(script))
        .route("/assets/charts.js", get(charts))
        .route("/assets/dashboard.css", get(style))
        .route("/api", get(async || Json(ROUTES)))
        .route("/api/status", get(status))
        .route("/api/manifest", get(manifest))
        .route("/api/ledger", get(ledger))
        .route("/api/blobs/{hash}", get(blobs::blob))
        .route("/api/steps", get(steps))
        .route("/api/evaluations", get(evaluations))
        .route("/api/events", get(events))
        .route("/metrics", get(metrics))
        .route("/p2p", get(p2p::p2p))
        .route("/api/admin/{action}", post(admin))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn(guard))
        .with_state(state)
}

/// Bounds the time and the body of a request, and adds headers to its answer.
async fn guard(request: Request, next: Next) -> Response {
    let admin = request.uri().path().starts_with("/api/admin");
    let api = request.uri().path().starts_with("/api") && !admin;
    let length = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let mut response = if length.is_some_and(|n: u64| n > BODY_BYTES_MAX as u64) {
        oversized().into_response()
    } else {
        match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
            Ok(response) => response,
            Err(_) => {
                let text = "the answer takes too long; try again later";
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, text).into_response()
            }
        }
    };
    let headers = response.headers_mut();
    let mut set = |name, text| headers.insert(name, HeaderValue::from_static(text));
    set(CONTENT_SECURITY_POLICY, CONTENT_SECURITY);
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(REFERRER_POLICY, "no-referrer");
    if api {
        // Public data: any page may show it. The operator's commands are not for other pages.
        set(ACCESS_CONTROL_ALLOW_ORIGIN, "*");
    }
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
    response
}

fn oversized() -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body is larger than {BODY_BYTES_MAX} bytes; no route needs one"),
    )
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    ([(CONTENT_TYPE, format!("{kind}; charset=utf-8"))], text).into_response()
}

async fn unknown() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is no such page; GET /api lists what there is")
}

async fn wrong_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this page takes another method; GET /api lists which",
    )
}

async fn status(State(state): State<HttpState>) -> Response {
    let status = state.status.borrow().clone();
    Json(&*status).into_response()
}

async fn manifest(State(state): State<HttpState>) -> Response {
    ([(CONTENT_TYPE, "application/json")], state.manifest).into_response()
}

/// Where a page of a list begins and how long it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    #[serde(default)]
    from: u64,
    limit: Option<usize>,
}

impl Page {
    fn of(query: Result<Query<Self>, QueryRejection>) -> Result<(u64, usize), ApiError> {
        let Query(page) = query.map_err(|error| {
            let text = format!("{}; ask with ?from=NUMBER&limit=NUMBER", error.body_text());
            ApiError::new(StatusCode::BAD_REQUEST, text)
        })?;
        Ok((page.from, page.limit.unwrap_or(PAGE_DEFAULT).min(PAGE_MAX)))
    }
}

type PageQuery = Result<Query<Page>, QueryRejection>;

async fn ledger(
    State(state): State<HttpState>,
    query: PageQuery,
) -> Result<Json<Vec<Record>>, ApiError> {
    let (from, limit) = Page::of(query)?;
    let read = tokio::task::spawn_blocking(move || (state.ledger)(from, limit)).await;
    let failed = |text: String| {
        tracing::error!(error = text, "the ledger cannot be read");
        let text = "the ledger cannot be read now; the operator's log says why";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text)
    };
    let mut records =
        read.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(format!("{e:#}")))?;
    records.truncate(limit);
    Ok(Json(records))
}

async fn steps(
    State(state): State<HttpState>,
    query: PageQuery,
) -> Result<Json<Vec<StepLine>>, ApiError> {
    let (from, limit) = Page::of(query)?;
    Ok(Json(state.feed.steps(from, limit)))
}

async fn evaluations(
    State(state): State<HttpState>,
    query: PageQuery,
) -> Result<Response, ApiError> {
    let (from, limit) = Page::of(query)?;
    Ok(Json(state.feed.evaluations(from, limit)).into_response())
}

async fn events(State(state): State<HttpState>) -> Result<Response, ApiError> {
    state.feed.subscribe()
}

async fn metrics(State(state): State<HttpState>) -> Result<Response, ApiError> {
    let status = state.status.borrow().clone();
    let text = metrics::metrics_text(&status).map_err(|error| {
        let text = format!("the metrics cannot be written: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text)
    })?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn admin(
    State(state): State<HttpState>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let bearer = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
    if !bearer.is_some_and(|offered| state.token.matches(offered.trim())) {
        let text = "this needs the operator's token: send the header `Authorization: Bearer TOKEN` with the text of the file admin-token in the directory of the coordination peer";
        return Err(ApiError::new(StatusCode::UNAUTHORIZED, text));
    }
    body.map_err(|_| oversized())?;
    let action = match name.as_str() {
        "pause" => AdminAction::Pause,
        "resume" => AdminAction::Resume,
        "stop" => AdminAction::Stop,
        _ => return Err(unknown().await),
    };
    let (reply, answer) = oneshot::channel();
    state.admin.try_send(AdminCommand { action, reply }).map_err(|error| {
        let text = match error {
            TrySendError::Full(_) => "earlier commands are still waiting; try again in a moment",
            TrySendError::Closed(_) => "the coordination peer is ending",
        };
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, text)
    })?;
    match tokio::time::timeout(ADMIN_TIMEOUT, answer).await {
        Ok(Ok(Ok(()))) => Ok(Json(json!({ "done": action })).into_response()),
        Ok(Ok(Err(why))) => Err(ApiError::new(StatusCode::CONFLICT, why)),
        Ok(Err(_)) | Err(_) => {
            let text =
                "the coordination peer did not answer; look at /api/status before trying again";
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, text))
        }
    }
}
