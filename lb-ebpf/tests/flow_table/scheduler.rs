//! Runs a few threads over one table in every order that matters.
//!
//! Threads change right before an access to a word that one thread writes and another touches; accesses to other words
//! cannot be told apart in time by anybody. Which words these are is found out on the way: when one more becomes known,
//! the exploration begins anew. What is explored is every order with at most so many preemptions, changes away from a
//! thread that could go on (Musuvathi and Qadeer, "Iterative Context Bounding", 2007), and then a number of random orders
//! with any number of them.
//!
//! An access takes place when it is made, as on a sequentially consistent machine. See `ARCHITECTURE.md` for why that is
//! enough on x86-64.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    sync::Arc,
    time::Duration,
};

use lb_common::interleave;
use shuttle::{
    Config, FailurePersistence, Runner, current,
    scheduler::{RandomScheduler, Schedule, Scheduler, Task, TaskId},
    thread,
};

use crate::table::Table;

/// What one thread does with the table, and what it has to say of it.
pub(crate) type Work<R> = Arc<dyn Fn(&Table) -> R + Send + Sync>;

/// Environment variable that sets the number of preemptions, for a longer search.
const VARIABLE: &str = "XDPVS_PREEMPTIONS";
/// Random orders that are tried besides.
const RANDOM: usize = 500;

/// The words that have been touched so far, by address: by which threads, and which of them may have written.
#[derive(Default)]
struct Words {
    touched: HashMap<usize, (u64, u64)>,
    shared: u64,
}

impl Words {
    /// Whether the word is one that a thread writes and another touches.
    fn touch(&mut self, word: usize, thread: u64, writes: bool) -> bool {
        let (touchers, writers) = self.touched.entry(word).or_default();
        let is_shared = |touchers: u64, writers| touchers.count_ones() > 1 && writers != 0;
        let was_shared = is_shared(*touchers, *writers);
        *touchers |= thread;
        *writers |= if writes { thread } else { 0 };
        let shared = is_shared(*touchers, *writers);
        self.shared += u64::from(shared && !was_shared);
        shared
    }
}

thread_local! {
    static WORDS: RefCell<Words> = RefCell::default();
    /// Executions of the last exploration.
    static EXECUTIONS: Cell<u64> = const { Cell::new(0) };
}

/// The thread that starts the others and looks at what they have left.
const MAIN: usize = 0;

fn before(word: usize, writes: bool) {
    let Some(thread) = current::try_get_current_task().map(usize::from) else { return };
    if thread != MAIN && WORDS.with_borrow_mut(|words| words.touch(word, 1 << thread, writes)) {
        // Of shuttle's ways to let others run, the one that says nothing about who should.
        thread::sleep(Duration::ZERO);
    }
}

/// The threads that could have gone on at some point, and which one did.
struct Choice {
    options: Vec<TaskId>,
    chosen: usize,
}

/// Every order with a bounded number of preemptions, depth first.
struct Bounded {
    bound: u32,
    /// Words that were known to be shared when the exploration began.
    shared: u64,
    path: Vec<Choice>,
    depth: usize,
    preemptions: u32,
}

impl Bounded {
    fn new(bound: u32) -> Self {
        Self { bound, shared: 0, path: Vec::new(), depth: 0, preemptions: 0 }
    }

    /// Goes on to the next order. Returns whether there is one.
    fn advance(&mut self) -> bool {
        while let Some(last) = self.path.last_mut() {
            last.chosen += 1;
            if last.chosen < last.options.len() {
                return true;
            }
            self.path.pop();
        }
        false
    }
}

impl Scheduler for Bounded {
    fn new_execution(&mut self) -> Option<Schedule> {
        let shared = WORDS.with_borrow(|words| words.shared);
        if EXECUTIONS.get() == 0 || shared != self.shared {
            self.shared = shared;
            self.path.clear();
        } else if !self.advance() {
            return None;
        }
        (self.depth, self.preemptions) = (0, 0);
        EXECUTIONS.set(EXECUTIONS.get() + 1);
        Some(Schedule::new(0))
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, _: bool) -> Option<TaskId> {
        let runnable: Vec<TaskId> = runnable.iter().map(|task| task.id()).collect();
        if let Some(main) = runnable.iter().find(|task| usize::from(**task) == MAIN) {
            return Some(*main);
        }
        let current = current.filter(|current| runnable.contains(current));
        let mut options: Vec<TaskId> = current.into_iter().collect();
        if current.is_none() || self.preemptions < self.bound {
            options.extend(runnable.into_iter().filter(|task| Some(*task) != current));
        }
        if options.len() == 1 {
            return options.pop();
        }
        if self.depth == self.path.len() {
            self.path.push(Choice { options, chosen: 0 });
        }
        // What has become known in the midst of this order may have made it another than before: it is begun anew then.
        let choice = &self.path[self.depth];
        let next = choice.options[choice.chosen];
        self.depth += 1;
        self.preemptions += u32::from(current.is_some_and(|current| current != next));
        Some(next)
    }

    fn next_u64(&mut self) -> u64 {
        0
    }
}

/// Explores what `threads` do with a table at the same time: `prepare` makes the table what they begin with, `check` is
/// given what they have said, in their order.
pub(crate) fn explore<R: Send + 'static>(
    table: Table,
    preemptions: u32,
    prepare: impl Fn(&Table) + Send + Sync + 'static,
    threads: Vec<Work<R>>,
    check: impl Fn(&Table, &[R]) + Send + Sync + 'static,
) {
    let preemptions = match std::env::var(VARIABLE) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{VARIABLE}={value} is not a number")),
        Err(_) => preemptions,
    };
    WORDS.set(Words::default());
    EXECUTIONS.set(0);
    let table = Arc::new(table);
    let execution = move || {
        table.clear();
        prepare(&table);
        let handles: Vec<_> = threads
            .iter()
            .map(|work| {
                let (table, work) = (Arc::clone(&table), Arc::clone(work));
                thread::spawn(move || work(&table))
            })
            .collect();
        let said: Vec<R> = handles.into_iter().map(|handle| handle.join().expect("no thread fails")).collect();
        check(&table, &said);
    };
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.failure_persistence = FailurePersistence::None;
    let execution = Arc::new(execution);
    let again = Arc::clone(&execution);
    interleave::watched(before, || {
        Runner::new(RandomScheduler::new_from_seed(1, RANDOM), config.clone()).run(move || again());
        Runner::new(Bounded::new(preemptions), config).run(move || execution());
    });
    let shared = WORDS.with_borrow(|words| words.shared);
    println!("{} orders with at most {preemptions} preemptions, {shared} shared words", EXECUTIONS.get());
    assert!(shared > 0, "the threads have nothing to do with each other");
}
