//! What the tests of xdpvs share.

pub mod cast;
pub mod frames;
pub mod lab;
pub mod world;
