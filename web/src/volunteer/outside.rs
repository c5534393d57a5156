//! What the worker's script does for the volunteer.

use js_sys::{Array, Uint8Array};
use wasm_bindgen::prelude::*;

use crate::hand::PartId;

#[wasm_bindgen]
extern "C" {
    /// The script. Nothing of it calls back at once.
    pub type Outside;
    /// All engines: forget everything, this is the model.
    #[wasm_bindgen(method)]
    pub fn model(this: &Outside, config: &str);
    /// All engines: make weights.
    #[wasm_bindgen(method)]
    pub fn load(this: &Outside, want: &str, base: Option<String>, blobs: Array);
    /// All engines: these weights are not needed any more.
    #[wasm_bindgen(method)]
    pub fn forget(this: &Outside, weights: &str);
    /// One engine: compute.
    #[wasm_bindgen(method)]
    pub fn compute(this: &Outside, engine: usize, part: PartId, unit: Uint8Array);
    /// An engine answers nonsense.
    #[wasm_bindgen(method)]
    pub fn broken(this: &Outside, engine: usize, why: &str);
    /// Keep a signed receipt, as JSON.
    #[wasm_bindgen(method)]
    pub fn keep(this: &Outside, receipt: &str);
    /// The ledger has the unit.
    #[wasm_bindgen(method)]
    pub fn accepted(this: &Outside, unit: &str, sequence: f64);
    /// A blob that was kept, or `undefined`.
    #[wasm_bindgen(method)]
    pub async fn read_blob(this: &Outside, hash: &str) -> JsValue;
    /// Keep a piece of a blob of that length.
    #[wasm_bindgen(method)]
    pub async fn write_blob(
        this: &Outside,
        hash: &str,
        offset: f64,
        bytes: Uint8Array,
        length: f64,
    ) -> JsValue;
    /// Something that people may want to know.
    #[wasm_bindgen(method)]
    pub fn say(this: &Outside, text: &str);
}
