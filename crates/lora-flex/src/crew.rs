//! Threads that stay awake from one small piece of work to the next.
//!
//! A step of decoding is hundreds of products one after the other, each of which two cores finish in tens
//! of microseconds. To wake a sleeping thread takes as long, so a pool that sleeps between them gains
//! nothing. Here a thread that has finished waits for [`AWAKE`] on its feet, and lies down only then.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a thread waits for the next piece of work before it sleeps: longer than what lies between two
/// products of a step, and between two steps.
const AWAKE: Duration = Duration::from_micros(200);

/// From when on a part in hand may be late.
const LATE: Duration = Duration::from_millis(1);

/// Pieces of work that are not shared after one that was late: the cores have other work, and whoever holds a
/// part may be without one for as long as many parts take.
const ALONE: usize = 128;

/// Looks at a flag between two at the clock.
const LOOKS: usize = 32;

type Job = Box<dyn FnOnce() + Send>;

/// What `work` gives for 0, 1, ... `parts`, in this order, on this thread and as many others as there are
/// and nobody else has at work.
///
/// Whoever is free takes the next part, so that a thread that has no core, on a machine with other work, is not
/// waited for unless it has one in hand: there should be a few parts for each thread.
///
/// # Panics
/// When `work` does.
pub(crate) fn share<R: Send + 'static>(
    parts: usize,
    work: impl Fn(usize) -> R + Send + Sync + 'static,
) -> Vec<R> {
    if parts < 2 || threads() == 1 {
        return (0..parts).map(work).collect();
    }
    share_with(crew(), parts, work)
}

fn share_with<R: Send + 'static>(
    crew: &Mutex<Crew>,
    parts: usize,
    work: impl Fn(usize) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let crew = crew.try_lock().ok();
    let Some(mut crew) = crew.filter(|crew| !crew.helpers.is_empty()) else {
        return (0..parts).map(work).collect();
    };
    if crew.alone > 0 {
        crew.alone -= 1;
        drop(crew);
        return (0..parts).map(work).collect();
    }
    let shared = Arc::new(Shared { work, next: AtomicUsize::new(0), done: Mutex::default() });
    let left = Arc::new(AtomicUsize::new(parts));
    for helper in crew.helpers.iter().take(parts - 1) {
        let (shared, left) = (shared.clone(), left.clone());
        helper.hand(Box::new(move || {
            let count = shared.take_parts(parts);
            drop(shared); // what it holds has one owner less when parts that were done here are counted
            left.fetch_sub(count, Ordering::Release);
        }));
    }
    let start = Instant::now();
    let own = shared.take_parts(parts);
    let late = LATE.max(2 * start.elapsed()); // a part in hand elsewhere takes no longer than those here
    left.fetch_sub(own, Ordering::Release);
    // A part that is still in hand and late is with a thread that lost its core: it may have this one.
    while !look_out(|| left.load(Ordering::Acquire) == 0, late) {
        crew.alone = ALONE;
        thread::yield_now();
    }
    // A job that nobody came for would keep what it holds.
    crew.helpers.iter().for_each(|helper| drop(helper.desk.put(None)));
    drop(crew);
    let mut done = std::mem::take(&mut *shared.done.lock().unwrap_or_else(PoisonError::into_inner));
    done.sort_unstable_by_key(|(part, _)| *part);
    let results = done.into_iter().map(|(_, result)| result);
    results.map(|result| result.unwrap_or_else(|panic| resume_unwind(panic))).collect()
}

/// One piece of work, of which the parts from `next` on are to be had.
struct Shared<R, W> {
    work: W,
    next: AtomicUsize,
    done: Mutex<Vec<(usize, Outcome<R>)>>,
}

/// What a part gave, or its panic.
type Outcome<R> = Result<R, Box<dyn Any + Send>>;

impl<R, W: Fn(usize) -> R> Shared<R, W> {
    /// Does one part after the other until there is none; how many.
    fn take_parts(&self, parts: usize) -> usize {
        let mut count = 0;
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return count;
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| (self.work)(part)));
            self.done.lock().unwrap_or_else(PoisonError::into_inner).push((part, outcome));
            count += 1;
        }
    }
}

/// Rayon's threads, and no more than there are cores: one that waits awake must not take the core of one at work.
fn threads() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = || std::thread::available_parallelism().map_or(usize::MAX, usize::from);
    rayon::current_num_threads().min(*CORES.get_or_init(cores))
}

/// Into how many parts to divide work that can be divided into `most`.
pub(crate) fn parts(most: usize) -> usize {
    const EACH: usize = 3; // parts of a thread
    match threads() {
        1 => 1,
        threads => (EACH * threads).min(most).max(1),
    }
}

/// The helpers; who holds the lock has them at work.
struct Crew {
    helpers: Vec<Helper>,
    /// Pieces of work still to be done without them.
    alone: usize,
}

fn crew() -> &'static Mutex<Crew> {
    static CREW: OnceLock<Mutex<Crew>> = OnceLock::new();
    CREW.get_or_init(|| Mutex::new(Crew::of(threads() - 1)))
}

impl Crew {
    fn of(helpers: usize) -> Self {
        Self { helpers: (0..helpers).map_while(|_| Helper::start()).collect(), alone: 0 }
    }
}

const FREE: u8 = 0;
const CALLED: u8 = 1;
const ASLEEP: u8 = 2;

/// What a helper and those who call it share.
#[derive(Default)]
struct Desk {
    job: Mutex<Option<Job>>,
    state: AtomicU8,
}

struct Helper {
    desk: Arc<Desk>,
    thread: Thread,
}

impl Helper {
    /// `None` where the system gives no thread.
    fn start() -> Option<Self> {
        let desk = Arc::new(Desk::default());
        let own = desk.clone();
        let thread = thread::Builder::new().name("lora-flex".into()).spawn(move || own.serve());
        Some(Self { desk, thread: thread.ok()?.thread().clone() })
    }

    fn hand(&self, job: Job) {
        self.desk.put(Some(job));
        if self.desk.state.swap(CALLED, Ordering::AcqRel) == ASLEEP {
            self.thread.unpark();
        }
    }
}

impl Desk {
    /// Lays a job on the desk, or clears it, and gives what lay there.
    fn put(&self, job: Option<Job>) -> Option<Job> {
        std::mem::replace(&mut *self.job.lock().unwrap_or_else(PoisonError::into_inner), job)
    }

    fn serve(&self) {
        loop {
            let called = || self.state.load(Ordering::Acquire) == CALLED;
            if !look_out(called, AWAKE) {
                let slept =
                    self.state.compare_exchange(FREE, ASLEEP, Ordering::AcqRel, Ordering::Acquire);
                while slept.is_ok() && !called() {
                    thread::park();
                }
                continue;
            }
            // Before the job is taken: one that is laid here meanwhile is taken now, and none is missed.
            self.state.store(FREE, Ordering::Release);
            let job = self.put(None);
            if let Some(job) = job {
                job();
            }
        }
    }
}

/// Looks until `come` holds, or `longest` is over; whether it holds.
fn look_out(come: impl Fn() -> bool, longest: Duration) -> bool {
    let end = Instant::now() + longest;
    loop {
        for _ in 0..LOOKS {
            if come() {
                return true;
            }
            std::hint::spin_loop();
        }
        if Instant::now() > end {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn parts_come_back_in_order_however_many_there_are() {
        for parts in [0, 1, 2, 3, 8, 65] {
            for _ in 0..20 {
                let expected: Vec<usize> = (0..parts).map(|part| part * part).collect();
                assert_eq!(share(parts, |part| part * part), expected);
            }
        }
    }

    #[test]
    fn callers_at_the_same_time_all_get_theirs() {
        thread::scope(|scope| {
            for caller in 0..8 {
                scope.spawn(move || {
                    for round in 0..200 {
                        let found = share(4, move |part| (caller, round, part));
                        let expected: Vec<_> = (0..4).map(|part| (caller, round, part)).collect();
                        assert_eq!(found, expected);
                    }
                });
            }
        });
    }

    #[test]
    fn it_works_again_after_a_sleep_and_after_a_panic() {
        for broken in [0, 1, 3] {
            let panicked = catch_unwind(|| share(4, move |part| assert_ne!(part, broken)));
            assert!(panicked.is_err());
            assert_eq!(share(3, |part| part), [0, 1, 2]);
            thread::sleep(3 * AWAKE);
            assert_eq!(share(3, |part| part), [0, 1, 2]);
        }
    }

    /// The threads of the parts of one piece of work, whose helper takes one part at least and holds each for
    /// `held` times as long as the caller has waited for it to come.
    fn threads_of(crew: &Mutex<Crew>, held: u32) -> Vec<thread::ThreadId> {
        let (caller, start) = (thread::current().id(), Instant::now());
        let begun = AtomicBool::new(false);
        share_with(crew, 4, move |_| {
            let own = thread::current().id();
            if own == caller {
                look_out(|| begun.load(Ordering::Acquire), Duration::from_secs(20));
            } else {
                begun.store(true, Ordering::Release);
                thread::sleep(held * (start.elapsed() + LATE));
            }
            own
        })
    }

    #[test]
    fn after_a_late_part_the_caller_works_alone_for_a_while() {
        let crew = Mutex::new(Crew::of(1));
        let caller = thread::current().id();
        let helped = |threads: Vec<_>| threads.iter().any(|thread| *thread != caller);
        // A caller that loses its core meanwhile does not see that the part is late.
        let late = (0..20).any(|_| {
            assert!(helped(threads_of(&crew, 100)), "nobody helps");
            crew.lock().unwrap().alone > 0
        });
        assert!(late, "no part was late");
        for piece in 0..ALONE {
            let threads = share_with(&crew, 4, |_| thread::current().id());
            assert_eq!(threads, [caller; 4], "piece {piece}");
        }
        assert!(helped(threads_of(&crew, 0)), "nobody helps any more");
    }

    #[test]
    fn what_the_work_holds_is_let_go() {
        let held = Arc::new(7);
        for _ in 0..200 {
            let work = held.clone();
            assert_eq!(share(4, move |_| *work), [7; 4]);
        }
        let alone = || Arc::strong_count(&held) == 1;
        assert!(look_out(alone, Duration::from_secs(20)), "a helper keeps it");
    }
}
