//! `set`: ip_vs's own settings.

use lb_userspace::{
    control::{
        session::Session,
        settings::{Setting, Value},
    },
    datapath::place::Place,
};
use serde::{Serialize, Serializer};

use crate::cli::{
    failure::Failure,
    output::{self, Form},
};

/// What `set` is told.
#[derive(clap::Args, Debug)]
pub(crate) struct Set {
    /// A setting, by the name that it has below /proc/sys/net/ipv4/vs/; all are shown if none is named
    name: Option<String>,
    /// What it is to be; it is shown if nothing is given
    #[arg(allow_hyphen_values = true, conflicts_with = "json")]
    value: Option<String>,
    #[command(flatten)]
    form: Form,
}

#[derive(Serialize)]
struct Settings {
    #[serde(serialize_with = "by_name")]
    settings: Vec<(&'static Setting, Value)>,
}

fn by_name<S: Serializer>(settings: &[(&'static Setting, Value)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(settings.iter().map(|(setting, value)| (setting.name, value)))
}

impl Set {
    /// Shows settings, or sets one.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        let named = self.name.as_deref().map(Setting::named).transpose()?;
        if let (Some(setting), Some(value)) = (named, &self.value) {
            let _lock = place.lock()?;
            let session = Session::open(place)?;
            return Ok(setting.set(&session.maps().shared(), value)?);
        }
        let session = Session::open(place)?;
        let wanted = Setting::all().filter(|setting| named.is_none_or(|named| named.name == setting.name));
        let settings = wanted.map(|setting| (setting, setting.value(&session.maps().config[0]))).collect();
        self.form.print(&Settings { settings }, text)
    }
}

fn text(settings: &Settings) -> String {
    let row = |(setting, value): &(&Setting, Value)| {
        let remark = setting.fixed_because().map_or_else(String::new, |because| format!("fixed: {because}"));
        vec![setting.name.to_owned(), value.to_string(), remark]
    };
    let rows: Vec<_> = settings.settings.iter().map(row).collect();
    output::table(&rows, &[])
}
