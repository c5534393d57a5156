//! bfp
