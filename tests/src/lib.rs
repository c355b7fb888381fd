//! What the tests of xdpvs share.

pub mod audit;
pub mod bulk;
pub mod cases;
pub mod cast;
pub mod executor;
pub mod family;
pub mod frames;
pub mod ftp;
pub mod lab;
pub mod network;
pub mod peers;
pub mod program;
pub mod tunnelled;
pub mod world;
