//! The ways to break the flow table that its tests have to notice.

/// A way to break it: in which file, what is replaced by what, and what that means.
pub(super) struct Mutation {
    pub(super) what: &'static str,
    pub(super) file: &'static str,
    pub(super) from: &'static str,
    pub(super) to: &'static str,
}

const TABLE: &str = "lb-ebpf/src/flow_table.rs";
const TEMPLATE: &str = "lb-ebpf/src/template.rs";
const TRACK: &str = "lb-ebpf/src/track.rs";
const AGEING: &str = "lb-ebpf/src/ageing.rs";
const FLOW: &str = "lb-common/src/flow.rs";

/// All of them.
pub(super) const MUTATIONS: &[Mutation] = &[
    Mutation {
        what: "a look-up believes what it has read, whatever the version",
        file: TABLE,
        from: "Word(entry.word().load()).same_life(word).then_some(Found { entry, word, dest })",
        to: "Some(Found { entry, word, dest })",
    },
    Mutation {
        what: "a look-up takes the word after the fields alone",
        file: TABLE,
        from: "    let dest = entry.dest().load();\n    Word(entry.word().load()).same_life(word)",
        to: "    let dest = entry.dest().load();\n    let word = Word(entry.word().load());\n    Word(entry.word().load()).same_life(word)",
    },
    Mutation {
        what: "a claim keeps the version",
        file: FLOW,
        from: ".wrapping_add(1 << VERSION_SHIFT) & VERSION_MASK;",
        to: " & VERSION_MASK;",
    },
    Mutation {
        what: "an entry is claimed by a store",
        file: TABLE,
        from: "is_used(word, clock) == 0 && entry.word().compare_exchange(word.0, word.claimed(tag).0).is_ok()",
        to: "is_used(word, clock) == 0 && { entry.word().store(word.claimed(tag).0); true }",
    },
    Mutation {
        what: "a connection makes room whatever has become of it",
        file: TABLE,
        from: "let now = consider(entry, candidate.index(), word, clock, idle);",
        to: "let now = candidate;",
    },
    Mutation {
        what: "a connection is published by a store",
        file: TABLE,
        from: "if entry.word().compare_exchange(busy.0, live.0).is_err() {",
        to: "entry.word().store(live.0);\n    if false {",
    },
    Mutation {
        what: "an insert looks for no rival",
        file: TABLE,
        from: "busy.status() != Status::Busy || rivalled(tables, insert, claim, kind)",
        to: "busy.status() != Status::Busy",
    },
    Mutation {
        what: "an insert looks for rivals in the first bucket alone",
        file: TABLE,
        from: "    for second in [false, true] {\n        let number = if second { insert.place",
        to: "    for second in [false] {\n        let number = if second { insert.place",
    },
    Mutation {
        what: "later claims are not killed",
        file: TABLE,
        from: "earlier || killed(word).is_err_and(|found| Word(found).is_live())",
        to: "let _ = killed;\n            earlier",
    },
    Mutation {
        what: "earlier claims are overlooked",
        file: TABLE,
        from: "earlier || killed(word).is_err_and(|found| Word(found).is_live())",
        to: "!earlier && killed(word).is_err_and(|found| Word(found).is_live())",
    },
    Mutation {
        what: "a claim that was published instead of being killed is overlooked",
        file: TABLE,
        from: "earlier || killed(word).is_err_and(|found| Word(found).is_live())",
        to: "let _ = killed(word);\n            earlier",
    },
    Mutation {
        what: "a claim that was given up instead of being killed is a rival",
        file: TABLE,
        from: "earlier || killed(word).is_err_and(|found| Word(found).is_live())",
        to: "earlier || killed(word).is_err()",
    },
    Mutation {
        what: "published connections are overlooked",
        file: TABLE,
        from: "!(over && release(tables, entry, word, entry.dest().load()))",
        to: "let _ = over;\n            false",
    },
    Mutation {
        what: "a connection that was killed is not given back",
        file: TABLE,
        from: "    if entry.word().compare_exchange(busy.0, live.0).is_err() {\n        give_up(entry, busy);\n",
        to: "    if entry.word().compare_exchange(busy.0, live.0).is_err() {\n",
    },
    Mutation {
        what: "who fails to publish a connection counts it too",
        file: TABLE,
        from: "    if entry.word().compare_exchange(busy.0, live.0).is_err() {\n        give_up(entry, busy);\n",
        to: "    if entry.word().compare_exchange(busy.0, live.0).is_err() {\n        give_up(entry, busy);\n        settle(tables, live, insert.dest);\n",
    },
    Mutation {
        what: "who fails to end a connection settles its counters too",
        file: TABLE,
        from: "    if done {\n        settle(tables, word, dest);\n    }\n    done\n",
        to: "    settle(tables, word, dest);\n    done\n",
    },
    Mutation {
        what: "a connection is ended by a store",
        file: TABLE,
        from: "    let done = entry.word().compare_exchange(word.0, word.freed().0).is_ok();\n",
        to: "    entry.word().store(word.freed().0);\n    let done = true;\n",
    },
    Mutation {
        what: "who takes over the entry of a connection that is over does not settle its counters",
        file: TABLE,
        from: "            if word.is_live() {\n                settle(tables, word, dest);\n            }\n            return Ok(claim);",
        to: "            let _ = dest;\n            return Ok(claim);",
    },
    Mutation {
        what: "connections that are over take up room",
        file: TABLE,
        from: "    (low | high) & !(low & high & opaque(over)) & 1\n",
        to: "    let _ = over;\n    (low | high) & 1\n",
    },
    Mutation {
        what: "a connection that is being filled in may be claimed",
        file: TABLE,
        from: "    (low | high) & !(low & high & opaque(over)) & 1\n",
        to: "    (low & high) & !opaque(over) & 1\n",
    },
    Mutation {
        what: "a connection is moved by a store",
        file: TRACK,
        from: "match found.entry.word().compare_exchange(word.0, after.0) {",
        to: "found.entry.word().store(after.0);\n        match Ok::<u64, u64>(word.0) {",
    },
    Mutation {
        what: "who fails to move a connection counts it too",
        file: TRACK,
        from: "        match found.entry.word().compare_exchange(word.0, after.0) {\n            Ok(_) => {\n",
        to: "        count(tables, found.dest, word, after);\n        match found.entry.word().compare_exchange(word.0, after.0) {\n            Ok(_) => {\n                count(tables, found.dest, after, word);\n",
    },
    Mutation {
        what: "a connection that has become another's is moved all the same",
        file: TRACK,
        from: "Err(current) if Word(current).same_life(word) =>",
        to: "Err(current) if Word(current).is_live() =>",
    },
    Mutation {
        what: "a flush leaves connections that packets move meanwhile",
        file: AGEING,
        from: "for _ in 0..opaque(END_ATTEMPTS as u64) {",
        to: "for _ in 0..1 {",
    },
    Mutation {
        what: "the timer ends connections in their last second",
        file: AGEING,
        from: "{ now.reached(word.expires()) } else { word.expired(now, hz) };",
        to: "{ now.reached(word.expires()) } else { word.expired(now, 0) };",
    },
    Mutation {
        what: "a template may be held that is being made or ended",
        file: TEMPLATE,
        from: "let holders = control::holders(old)?;",
        to: "let holders = old & !control::TEMPLATE;",
    },
    Mutation {
        what: "who holds a template is counted by a store",
        file: TEMPLATE,
        from: "if entry.control().compare_exchange(old, old + 1).is_ok() {",
        to: "entry.control().store(old + 1);\n        if true {",
    },
    Mutation {
        what: "who lets go of a template is counted by a store",
        file: TEMPLATE,
        from: "let last = entry.control().fetch_add(u32::MAX) == control::TEMPLATE + 1;",
        to: "let before = entry.control().load();\n    entry.control().store(before.wrapping_sub(1));\n    let last = before == control::TEMPLATE + 1;",
    },
    Mutation {
        what: "a template ends although it is held",
        file: TEMPLATE,
        from: "close(entry) && end_closed(tables, entry, word)",
        to: "end_closed(tables, entry, word)",
    },
    Mutation {
        what: "a template that was closed in vain stays closed",
        file: TEMPLATE,
        from: "    reopen(entry);\n    false\n",
        to: "    false\n",
    },
    Mutation {
        what: "a doomed template is left to others who left it to this one",
        file: TEMPLATE,
        from: "Err(found) if Word(found).has(template::DOOMED) => word = Word(tables.hide(found)),",
        to: "Err(found) if word.0 == found => word = Word(tables.hide(found)),",
    },
    Mutation {
        what: "a template is ended by a store",
        file: TEMPLATE,
        from: "match entry.word().compare_exchange(word.0, word.freed().0) {",
        to: "entry.word().store(word.freed().0);\n        match Ok::<u64, u64>(word.0) {",
    },
    Mutation {
        what: "whoever lets go of a template last ends what has come after it",
        file: TEMPLATE,
        from: "word.same_life(held)\n            &&",
        to: "word.is_live()\n            && word.is_template()\n            && { let _ = held; true }\n            &&",
    },
    Mutation {
        what: "a forced end takes along a template that is assured",
        file: TEMPLATE,
        from: "how & FORCED != 0 && !word.has(template::ASSURED)",
        to: "how & FORCED != 0",
    },
    Mutation {
        what: "a doomed template stays when its last holder has let go",
        file: TEMPLATE,
        from: "(word.has(template::DOOMED) || how & FORCED",
        to: "(how & FORCED",
    },
    Mutation {
        what: "what is done to a template's word is done to what has come after it",
        file: TEMPLATE,
        from: "if !word.same_life(life) {",
        to: "let _ = life;\n        if !word.is_live() || !word.is_template() {",
    },
    Mutation {
        what: "a template's word is changed by a store",
        file: TEMPLATE,
        from: "if after == word || entry.word().compare_exchange(word.0, after.0).is_ok() {",
        to: "entry.word().store(after.0);\n        if true {",
    },
    Mutation {
        what: "whoever holds a template does not look whose it is",
        file: TEMPLATE,
        from: "if !entry.is(key, word) {",
        to: "if false {",
    },
    Mutation {
        what: "a template that was found over ends whatever has become of it",
        file: TEMPLATE,
        from: "return if end_closed(tables, entry, word) {",
        to: "return if end_closed(tables, entry, Word(entry.word().load())) {",
    },
    Mutation {
        what: "a template that was found over ends although others hold it",
        file: TEMPLATE,
        from: "if entry.control().compare_exchange(control::TEMPLATE + 1, control::CLOSED).is_ok() {",
        to: "entry.control().store(control::CLOSED);\n        if true {",
    },
    Mutation {
        what: "a template that no connection may go by is found again",
        file: TEMPLATE,
        from: "        entry.retire();\n        tables.let_go(found, 0);\n",
        to: "        tables.let_go(found, 0);\n",
    },
    Mutation {
        what: "a template may be held before all of it is there",
        file: TEMPLATE,
        from: "birth, clock, control: control::CLOSED };",
        to: "birth, clock, control: control::TEMPLATE };",
    },
    Mutation {
        what: "a template whose time is over is looked at in every sweep",
        file: TEMPLATE,
        from: "        let _ = entry.word().compare_exchange(word.0, again.0);\n",
        to: "        let _ = again;\n",
    },
    Mutation {
        what: "a template is doomed by who does not hold it",
        file: TEMPLATE,
        from: "    if join(entry).is_none() {\n        return false;\n    }\n",
        to: "",
    },
    Mutation {
        what: "a connection that ends does not let go of its template",
        file: TABLE,
        from: "    if done && word.has(flag::CONTROLLED) {",
        to: "    if false {",
    },
    Mutation {
        what: "who takes over the entry of a connection does not let go of its template",
        file: TABLE,
        from: "            if word.has(flag::CONTROLLED) {\n                tables.let_go(control, 0);\n            }\n",
        to: "            let _ = control;\n",
    },
    Mutation {
        what: "a template that is over may be claimed",
        file: TABLE,
        from: "let over = u64::from((!past).cast_unsigned() >> 31) & !(word.0 >> 2 & word.0 >> 3);",
        to: "let over = u64::from((!past).cast_unsigned() >> 31);",
    },
    Mutation {
        what: "templates are not counted",
        file: TABLE,
        from: "Kind::Template => template::count(tables, insert.dest, 1),",
        to: "Kind::Template => (),",
    },
    Mutation {
        what: "a packet assures the template of a connection that has ended",
        file: TRACK,
        from: "    if Word(entry.word().load()).same_life(after) {\n        tables.assure",
        to: "    let _ = after;\n    if true {\n        tables.assure",
    },
    Mutation {
        what: "a flush leaves a template that controls connections",
        file: AGEING,
        from: "template::doom(tables, entry, word, number)))",
        to: "template::end(tables, entry, word) && number != 0))",
    },
];
