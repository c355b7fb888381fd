//! The command line, as its users meet it: the program in a network namespace. Needs root.

#[path = "cli/crashes.rs"]
mod crashes;
#[path = "cli/golden.rs"]
mod golden;
#[path = "cli/marks.rs"]
mod marks;
#[path = "cli/native.rs"]
mod native;
#[path = "cli/running.rs"]
mod running;
#[path = "cli/scale.rs"]
mod scale;
#[path = "cli/secret.rs"]
mod secret;
#[path = "cli/settings.rs"]
mod settings;
#[path = "cli/six.rs"]
mod six;
#[path = "cli/stage.rs"]
mod stage;
