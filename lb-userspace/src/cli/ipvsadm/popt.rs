//! Splitting a command line into options as popt does, the library that ipvsadm reads its words with.

/// Whether an option has an argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Argument {
    /// It has none.
    None,
    /// It takes the rest of its word, or else the next word whatever that is.
    Required,
    /// It takes the rest of its word, or else the next word unless that begins with `-`.
    Optional,
}

/// An option that may be given.
pub(super) struct Definition<T> {
    /// Its long spelling, without `--`.
    pub(super) long: Option<&'static str>,
    /// Its short spelling.
    pub(super) short: Option<char>,
    /// Whether it has an argument.
    pub(super) argument: Argument,
    /// What it is.
    pub(super) tag: T,
}

/// What is wrong with a word: the word, and popt's text for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Bad(pub(super) String, pub(super) &'static str);

/// An option as it was given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Given<T> {
    /// What it is.
    pub(super) tag: T,
    /// Its argument.
    pub(super) argument: Option<String>,
    /// The word it stands in.
    pub(super) word: String,
}

/// A command line that is being read.
pub(super) struct Reader<'a, T> {
    definitions: &'a [Definition<T>],
    words: &'a [String],
    next: usize,
    /// What is left of a word of several short options.
    bundle: &'a str,
    /// Whether `--` has been met, after which nothing is an option.
    over: bool,
    leftover: Vec<&'a str>,
}

impl<'a, T: Copy> Reader<'a, T> {
    pub(super) fn new(definitions: &'a [Definition<T>], words: &'a [String]) -> Self {
        Self { definitions, words, next: 0, bundle: "", over: false, leftover: Vec::new() }
    }

    /// The words that were neither options nor arguments of options, as far as the line has been read.
    pub(super) fn leftover(&self) -> &[&'a str] {
        &self.leftover
    }

    /// The next option; `None` at the end.
    pub(super) fn option(&mut self) -> Option<Result<Given<T>, Bad>> {
        if self.bundle.is_empty() {
            let word = loop {
                let word = self.words.get(self.next)?.as_str();
                self.next += 1;
                match word {
                    _ if self.over => self.leftover.push(word),
                    "--" => self.over = true,
                    _ if !word.starts_with('-') || word == "-" => self.leftover.push(word),
                    _ => break word,
                }
            };
            if let Some(long) = word.strip_prefix("--") {
                return Some(self.long(word, long));
            }
            self.bundle = &word[1..];
        }
        Some(self.short())
    }

    /// The word read last.
    fn word(&self) -> &'a str {
        self.words[self.next - 1].as_str()
    }

    fn long(&mut self, word: &'a str, long: &'a str) -> Result<Given<T>, Bad> {
        let (name, attached) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
        let found = self.definitions.iter().find(|definition| definition.long == Some(name));
        let definition = found.ok_or_else(|| Bad(word.to_owned(), "unknown option"))?;
        if attached.is_some() && definition.argument == Argument::None {
            return Err(Bad(word.to_owned(), "option does not take an argument"));
        }
        self.given(definition.tag, definition.argument, attached)
    }

    fn short(&mut self) -> Result<Given<T>, Bad> {
        let mut rest = self.bundle.chars();
        let letter = rest.next();
        let found = self.definitions.iter().find(|definition| letter.is_some() && definition.short == letter);
        let Some(definition) = found else {
            self.bundle = "";
            return Err(Bad(self.word().to_owned(), "unknown option"));
        };
        self.bundle = rest.as_str();
        if definition.argument == Argument::None && self.bundle.starts_with('=') {
            self.bundle = "";
            return Err(Bad(self.word().to_owned(), "option does not take an argument"));
        }
        let mut attached = None;
        if definition.argument != Argument::None && !self.bundle.is_empty() {
            attached = Some(self.bundle.strip_prefix('=').unwrap_or(self.bundle));
            self.bundle = "";
        }
        self.given(definition.tag, definition.argument, attached)
    }

    fn given(&mut self, tag: T, argument: Argument, attached: Option<&str>) -> Result<Given<T>, Bad> {
        let word = self.word().to_owned();
        let next = self.words.get(self.next).map(String::as_str);
        let taken = match (argument, attached, next) {
            (Argument::None, ..) => None,
            (_, Some(value), _) => Some(value),
            (Argument::Required, None, None) => return Err(Bad(word, "missing argument")),
            (Argument::Optional, None, next) if next.is_none_or(|next| next.starts_with('-')) => None,
            (_, None, next) => {
                self.next += 1;
                next
            }
        };
        Ok(Given { tag, argument: taken.map(str::to_owned), word })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFINITIONS: [Definition<char>; 4] = [
        Definition { long: Some("list"), short: Some('L'), argument: Argument::None, tag: 'L' },
        Definition { long: Some("numeric"), short: Some('n'), argument: Argument::None, tag: 'n' },
        Definition { long: Some("tcp-service"), short: Some('t'), argument: Argument::Required, tag: 't' },
        Definition { long: Some("persistent"), short: Some('p'), argument: Argument::Optional, tag: 'p' },
    ];

    /// Options with their arguments, leftover words, and what is wrong.
    fn read(line: &str) -> (String, String, Option<Bad>) {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let mut reader = Reader::new(&DEFINITIONS, &words);
        let mut options = String::new();
        let mut bad = None;
        while let Some(option) = reader.option() {
            match option {
                Ok(Given { tag, argument: Some(argument), .. }) => options += &format!("{tag}({argument})"),
                Ok(Given { tag, .. }) => options.push(tag),
                Err(wrong) => {
                    bad = Some(wrong);
                    break;
                }
            }
        }
        (options, reader.leftover().join(" "), bad)
    }

    // What popt 1.19 makes of these lines.
    #[test]
    fn short_options_bundle_and_take_what_follows() {
        for (line, options) in [
            ("-Ln", "Ln"),
            ("-L -n", "Ln"),
            ("--list --numeric", "Ln"),
            ("-Lt a", "Lt(a)"),
            ("-Lta", "Lt(a)"),
            ("-t=a", "t(a)"),
            ("-t -n", "t(-n)"),
            ("--tcp-service a", "t(a)"),
            ("--tcp-service=a=b", "t(a=b)"),
            ("-p 5 -n", "p(5)n"),
            ("-p -n", "pn"),
            ("-p", "p"),
            ("-p=7", "p(7)"),
            ("-p=", "p()"),
            ("-t=", "t()"),
            ("--tcp-service=", "t()"),
            ("--persistent -n", "pn"),
            ("-pn", "p(n)"),
            ("-np 5", "np(5)"),
            ("-p  -n", "p()n"),
            ("-t -- -n", "t(--)n"),
        ] {
            assert_eq!(read(line), (options.into(), String::new(), None), "{line}");
        }
    }

    #[test]
    fn other_words_are_left_over() {
        assert_eq!(read("a -L b - -- -n"), ("L".into(), "a b - -n".into(), None));
        assert_eq!(read("-p - -n"), ("pn".into(), "-".into(), None));
        assert_eq!(read("-t= a"), ("t()".into(), "a".into(), None));
        assert_eq!(read("-- -L"), (String::new(), "-L".into(), None));
    }

    #[test]
    fn the_whole_word_is_bad() {
        let bad = |word: &str, text| Some(Bad(word.into(), text));
        assert_eq!(read("-Lnt"), ("Ln".into(), String::new(), bad("-Lnt", "missing argument")));
        assert_eq!(read("-Lq"), ("L".into(), String::new(), bad("-Lq", "unknown option")));
        assert_eq!(read("--bogus"), (String::new(), String::new(), bad("--bogus", "unknown option")));
        assert_eq!(read("-p -5"), ("p".into(), String::new(), bad("-5", "unknown option")));
        for word in ["--list=x", "--list=", "-L=n"] {
            let bad = bad(word, "option does not take an argument");
            assert_eq!(read(word), (String::new(), String::new(), bad));
        }
        assert_eq!(read("--bogus=3").2, bad("--bogus=3", "unknown option"));
        assert_eq!(read("--num").2, bad("--num", "unknown option"));
    }
}
