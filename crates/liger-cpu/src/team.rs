//! Threads that stay awake between operations. A decoding step is hundreds of operations of some microseconds each: what
//! puts its threads to sleep after every one of them spends most of the time on waking.
//!
//! Each thread begins with a range of tasks of its own, the same one from operation to operation, so that it finds in its caches what
//! it wrote before; who is done takes what is left of the others'. So a thread that is late or slow (the machine has other work) is
//! waited for no longer than its last task takes. Members look for the next job for a while before they sleep. Where there are as many
//! threads as CPUs that the program may use, each member keeps to one of them.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::Thread;

#[cfg(target_os = "linux")]
use rustix::thread::CpuSet;

/// Looks for a job before a member sleeps: from 100 microseconds to a millisecond, by CPU.
const LOOKS: usize = 20_000;

/// Tasks `0..count` of one call.
#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
    count: usize,
}

struct Team {
    /// Held by whoever has the members work.
    busy: Mutex<()>,
    /// Number of the job that can be joined, 0 for none. The job is not changed while it can be, nor while members are inside.
    open: AtomicUsize,
    job: UnsafeCell<Job>,
    /// The next task to take of each thread's range.
    next: Vec<AtomicUsize>,
    /// Members that may be reading the job.
    inside: AtomicUsize,
    has_panicked: AtomicBool,
    members: Vec<Member>,
}

struct Member {
    is_asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

// SAFETY: `job` is written only by the holder of `busy` while no job is open and nobody is inside; members read it only while
// they are counted in `inside` and have seen it open. What it points to is `Sync`, see `for_tasks`.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

/// Calls `f(i)` for every task, on all threads of the team. Inside a task, or while another thread has the team work, the tasks
/// are run one after another.
pub(crate) fn for_tasks<F: Fn(usize) + Sync>(count: usize, f: F) {
    let team = team();
    let guard = match team.busy.try_lock() {
        _ if count <= 1 || team.members.is_empty() => None,
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    };
    let Some(guard) = guard else { return (0..count).for_each(f) };
    unsafe fn call<F: Fn(usize)>(data: *const (), task: usize) {
        // SAFETY: `data` is the `f` of the call that made the job, which outlives it.
        unsafe { (*data.cast::<F>())(task) }
    }
    let panicked = team.run(Job { data: (&raw const f).cast(), call: call::<F>, count });
    drop(guard);
    if let Some(panic) = panicked {
        resume_unwind(panic);
    }
}

/// Threads that work on a job.
pub(crate) fn threads() -> usize {
    team().members.len() + 1
}

fn team() -> &'static Team {
    static TEAM: OnceLock<&Team> = OnceLock::new();
    TEAM.get_or_init(|| {
        let member = |_| Member { is_asleep: AtomicBool::new(false), thread: OnceLock::new() };
        let nothing = Job { data: std::ptr::null(), call: |_, _| {}, count: 0 };
        // It lives as long as the program.
        let team: &'static Team = Box::leak(Box::new(Team {
            busy: Mutex::new(()),
            open: AtomicUsize::new(0),
            job: UnsafeCell::new(nothing),
            next: (0..rayon::current_num_threads()).map(|_| AtomicUsize::new(0)).collect(),
            inside: AtomicUsize::new(0),
            has_panicked: AtomicBool::new(false),
            members: (1..rayon::current_num_threads()).map(member).collect(),
        }));
        let mut cpus = cpus_of_members(team.members.len()).into_iter();
        for (i, member) in team.members.iter().enumerate() {
            let cpu = cpus.next();
            let started = std::thread::Builder::new().name(format!("liger-cpu-{i}")).spawn(move || {
                if let Some(cpu) = cpu {
                    keep_to_cpu(cpu);
                }
                team.work(member, i + 1);
            });
            // Without it the others do its work.
            if let Ok(handle) = started {
                let _ = member.thread.set(handle.thread().clone());
            }
        }
        team
    })
}

/// The number of a CPU for each member, if with the calling thread they are as many as the CPUs that the program may use: the system then has none that is
/// free for a thread it moves. The calling thread, which is not ours, is left the first one. Else none: they go where there is room.
fn cpus_of_members(members: usize) -> Vec<usize> {
    #[cfg(target_os = "linux")]
    if let Ok(allowed) = rustix::thread::sched_getaffinity(None)
        && allowed.count() as usize == members + 1
    {
        return (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).skip(1).collect();
    }
    let _ = members;
    Vec::new()
}

/// Keeps the thread that calls to the CPU of this number, if the system lets it.
fn keep_to_cpu(number: usize) {
    #[cfg(target_os = "linux")]
    {
        let mut only = CpuSet::new();
        only.set(number);
        let _ = rustix::thread::sched_setaffinity(None, &only);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = number;
}

impl Team {
    fn run(&self, job: Job) -> Option<Box<dyn std::any::Any + Send>> {
        static JOBS: AtomicUsize = AtomicUsize::new(1);
        // SAFETY: `busy` is held, no job is open, and nobody is inside: the last call saw to both.
        unsafe { *self.job.get() = job };
        for (thread, next) in self.next.iter().enumerate() {
            // Seen by whoever sees the job open.
            next.store(self.range(job, thread).start, Relaxed);
        }
        self.open.store(JOBS.fetch_add(1, SeqCst), SeqCst);
        for member in &self.members {
            if member.is_asleep.load(SeqCst)
                && member.is_asleep.swap(false, SeqCst)
                && let Some(thread) = member.thread.get()
            {
                thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, 0)));
        self.open.store(0, SeqCst);
        let mut looks = 0;
        while self.inside.load(SeqCst) > 0 {
            looks += 1;
            // A member that the system has put aside needs this CPU.
            if looks % 1000 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        match own {
            Err(panic) => Some(panic),
            Ok(()) if self.has_panicked.swap(false, SeqCst) => Some(Box::new("a task of the team panicked")),
            Ok(()) => None,
        }
    }

    /// Tasks that a thread begins with.
    fn range(&self, job: Job, thread: usize) -> Range<usize> {
        let threads = self.next.len();
        job.count * thread / threads..job.count * (thread + 1) / threads
    }

    /// A thread's own tasks, then what is left of those of the threads after it.
    fn take_tasks(&self, job: Job, own: usize) {
        let threads = self.next.len();
        for thread in (own..threads).chain(0..own) {
            let (next, end) = (&self.next[thread], self.range(job, thread).end);
            // Looked at first: a range that is done stays in everybody's caches.
            while next.load(SeqCst) < end {
                let task = next.fetch_add(1, SeqCst);
                if task >= end {
                    break;
                }
                // SAFETY: `for_tasks` waits for everybody inside, so what `data` points to is still there.
                unsafe { (job.call)(job.data, task) };
            }
        }
    }

    /// What a member, with its number among the threads, does for ever.
    fn work(&self, member: &Member, number: usize) {
        let (mut last, mut looks) = (0, 0);
        loop {
            let open = self.open.load(SeqCst);
            if open != 0 && open != last {
                (last, looks) = (open, 0);
                self.inside.fetch_add(1, SeqCst);
                // It may have been closed in between: then the job must not be read.
                if self.open.load(SeqCst) == open {
                    // SAFETY: the job is open and this member is counted as inside.
                    let job = unsafe { *self.job.get() };
                    if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, number))).is_err() {
                        self.has_panicked.store(true, SeqCst);
                    }
                }
                self.inside.fetch_sub(1, SeqCst);
            } else if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                member.is_asleep.store(true, SeqCst);
                // A job that was opened before that was seen would not wake this member.
                if [0, last].contains(&self.open.load(SeqCst)) {
                    while member.is_asleep.load(SeqCst) {
                        std::thread::park();
                    }
                }
                member.is_asleep.store(false, SeqCst);
                looks = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once_and_the_call_ends_after_the_last() {
        for count in (0..40).chain([1000]) {
            for _ in 0..50 {
                let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                for_tasks(count, |task| {
                    done[task].fetch_add(1, SeqCst);
                });
                assert!(done.iter().all(|times| times.load(SeqCst) == 1), "{count} tasks");
            }
        }
    }

    #[test]
    fn members_that_sleep_are_woken_and_calls_may_be_nested_and_come_from_many_threads() {
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for pause in [0, 1, 3] {
                        std::thread::sleep(std::time::Duration::from_millis(pause));
                        for_tasks(8, |_| for_tasks(4, |_| _ = sum.fetch_add(1, SeqCst)));
                    }
                });
            }
        });
        assert_eq!(sum.load(SeqCst), 4 * 3 * 32);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn members_keep_to_a_cpu_where_threads_are_as_many_as_these() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let count = allowed.count() as usize;
        assert_eq!(cpus_of_members(count).len(), 0);
        let cpus = cpus_of_members(count - 1);
        assert_eq!(cpus.len(), count - 1);
        for cpu in cpus {
            let only = std::thread::spawn(move || {
                keep_to_cpu(cpu);
                rustix::thread::sched_getaffinity(None).unwrap()
            });
            let only = only.join().unwrap();
            assert!(only.count() == 1 && only.is_set(cpu) && allowed.is_set(cpu));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        for task in 0..8 {
            let found = catch_unwind(|| for_tasks(8, |i| assert!(i != task, "task {i}")));
            assert!(found.is_err());
        }
        for_tasks(8, |_| {});
    }
}
