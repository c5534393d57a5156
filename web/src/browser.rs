//! The little of the browser that is not in `web-sys`: what pages and workers both have.

use js_sys::Promise;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = performance, js_name = now)]
    fn performance_now() -> f64;
    #[wasm_bindgen(js_name = setTimeout)]
    fn set_timeout(callback: &js_sys::Function, ms: u32) -> JsValue;
}

/// Milliseconds of a monotonic clock.
pub fn now_ms() -> f64 {
    performance_now()
}

/// Milliseconds since 1970.
pub fn date_ms() -> f64 {
    js_sys::Date::now()
}

/// Waits.
pub async fn sleep(ms: u32) {
    let promise = Promise::new(&mut |resolve, _| drop(set_timeout(&resolve, ms)));
    // A timer never fails.
    let _ = JsFuture::from(promise).await;
}

/// An error of JavaScript, for people.
pub fn text(error: &JsValue) -> String {
    match error.dyn_ref::<js_sys::Error>() {
        Some(error) => String::from(error.message()),
        None => error.as_string().unwrap_or_else(|| format!("{error:?}")),
    }
}
