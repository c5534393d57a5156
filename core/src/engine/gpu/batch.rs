//! What the kernels know of a batch: uploaded once, used by every layer.

use manyhands_shaders::bfp::{BLOCK, padded};
use manyhands_shaders::wgsl::ROW_WORDS;

use super::memory::Buf;
use super::recorder::Recorder;
use crate::engine::Batch;

/// A batch on the device.
pub(super) struct BatchTables {
    batch: Batch,
    /// (N) token ids.
    pub(super) tokens: Buf,
    /// (N) of `Row`.
    pub(super) rows: Buf,
    /// (B, 2): first row and number of rows of each block of 32 tokens of a segment.
    pub(super) token_blocks: Buf,
    /// (B): blocks of the block's segment, with the top bit at its last one.
    pub(super) segments: Buf,
    /// B.
    pub(super) block_count: usize,
    /// Keys that the longest segment sees, rounded up to whole blocks.
    pub(super) keys: usize,
}

impl BatchTables {
    pub(super) fn new(recorder: &Recorder, batch: &Batch) -> Self {
        let mut rows: Vec<[u32; ROW_WORDS]> = vec![[0; ROW_WORDS]; batch.rows()];
        let (mut token_blocks, mut segments) = (Vec::<[u32; 2]>::new(), Vec::<u32>::new());
        for s in &batch.segments {
            let (first_block, blocks) = (token_blocks.len() as u32, s.rows.div_ceil(BLOCK));
            let (first, count) = (s.first_row as u32, s.rows as u32);
            for i in 0..s.rows {
                let position = (s.position + i) as u32;
                let row = [s.slot as u32, position, first, count, first_block, 0, 0, 0];
                rows[s.first_row + i] = row;
            }
            for b in 0..blocks {
                let at = b * BLOCK;
                token_blocks.push([(s.first_row + at) as u32, BLOCK.min(s.rows - at) as u32]);
                segments.push(blocks as u32 | if b + 1 == blocks { 1 << 31 } else { 0 });
            }
        }
        let keys = batch.segments.iter().map(|s| padded(s.position + s.rows)).max().unwrap_or(0);
        Self {
            tokens: recorder.upload(&batch.tokens),
            rows: recorder.upload(&rows),
            token_blocks: recorder.upload(&token_blocks),
            segments: recorder.upload(&segments),
            block_count: token_blocks.len(),
            keys,
            batch: batch.clone(),
        }
    }

    /// Whether these are the tables of `batch`.
    pub(super) fn describes(&self, batch: &Batch) -> bool {
        self.batch == *batch
    }
}
