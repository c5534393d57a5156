//! Tasks with verifiable rewards.
