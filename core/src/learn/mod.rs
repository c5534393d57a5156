//! Learning: objectives, optimizer, evaluation.
