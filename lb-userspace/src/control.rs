//! The configuration of an instance: what it is, how it is changed, and what the data plane is given of it.
//!
//! The truth are the records of services and destinations. A [`change::Change`] is planned on a copy of them and refused
//! as a whole if any part of it is not possible. What is to be written is then put into the journal, and one store makes
//! it count: a process killed before leaves everything as it was, and what one killed after has left undone is done by
//! the next. [`compile`] derives from the records what packets read, beside what they read now; one store per service
//! puts it in force.

pub mod bulk;
pub mod change;
pub mod compile;
pub mod connections;
pub mod index;
pub mod journal;
pub mod marks;
pub mod model;
pub mod session;
pub mod settings;
pub mod shared;
pub mod state;
pub mod traffic;
