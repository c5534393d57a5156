// What a kernel knows of a row of the batch.
struct Row {
    // Slot of the key-value cache, and position in the sequence.
    slot: u32,
    position: u32,
    // First row of the row's segment, and how many rows the segment has.
    first_row: u32,
    segment_rows: u32,
    // Index of the segment's first block of 32 tokens.
    first_block: u32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
}
