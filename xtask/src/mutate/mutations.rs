//! The ways to break the flow table that its tests have to notice.

/// A way to break it: in which file, what is replaced by what, and what that means.
pub(super) struct Mutation {
    pub(super) what: &'static str,
    pub(super) file: &'static str,
    pub(super) from: &'static str,
    pub(super) to: &'static str,
}

const TABLE: &str = "lb-ebpf/src/flow_table.rs";
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
        what: "a connection makes room by a store",
        file: TABLE,
        from: "now != Candidate::NONE && entry.word().compare_exchange(word.0, word.claimed(tag).0).is_ok()",
        to: "now != Candidate::NONE && { entry.word().store(word.claimed(tag).0); true }",
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
];
