//! Work split over the threads of the team.

pub(crate) use crate::team::{for_tasks, threads};

/// A slice that several tasks write at the same time, each its own places.
pub(crate) struct Disjoint<'a, T = f32> {
    data: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: whoever writes through the pointer promises that no two tasks overlap.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), life: std::marker::PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `count` elements from `start`.
    ///
    /// # Safety
    /// No other live slice of the same object may overlap these elements.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, count: usize) -> &mut [T] {
        // SAFETY: in bounds, as was looked at; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(start, count), count) }
    }

    /// Where `count` elements from `start` begin, of which some are the caller's to write.
    pub(crate) fn pointer(&self, start: usize, count: usize) -> *mut T {
        assert!(start + count <= self.len, "{start} + {count} of {}", self.len);
        self.data.wrapping_add(start)
    }
}

/// Rows that one task takes at least, so that small tensors stay on one thread.
fn rows_per_task(rows: usize, width: usize) -> usize {
    let enough = 16_384usize.div_ceil(width.max(1));
    rows.div_ceil(4 * threads()).max(enough)
}

/// Pieces of a product of so many multiplications with weights that are read once: one a thread, for a long stretch of memory is read
/// faster than several short ones; where there is much to do, several, for threads are not equally fast.
pub(crate) fn pieces(work: usize) -> usize {
    (work >> 18).clamp(threads(), 4 * threads()) / threads() * threads()
}

/// Calls `f(first row, rows)` for pieces of `data`, a matrix of rows of `width`.
pub(crate) fn for_rows<T: Send>(data: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let rows = rows_per_task(data.len() / width.max(1), width);
    if rows * width >= data.len() {
        return f(0, data);
    }
    let (count, all) = (data.len(), Disjoint::new(data));
    for_tasks(count.div_ceil(rows * width), |i| {
        let start = i * rows * width;
        // SAFETY: tasks have distinct rows.
        f(i * rows, unsafe { all.slice(start, (rows * width).min(count - start)) });
    });
}

/// Runs plain loops compiled for the widest vectors that this CPU has. Only what is inlined into the closure is compiled
/// for them: functions that it calls must be `#[inline(always)]`.
macro_rules! vectorized {
    (|| $body:expr $(,)?) => {
        $crate::parallel::vectorize(
            #[inline(always)]
            || $body,
        )
    };
}
pub(crate) use vectorized;

/// What [`vectorized!`] calls. `FnMut`, though called once: taken as `FnOnce`, a closure that could be called again gets a function
/// of its own around it, which is compiled without the vectors, and its body with it.
#[inline(always)]
pub(crate) fn vectorize<R>(f: impl FnMut() -> R) -> R {
    struct Loops<F>(F);
    impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Loops<F> {
        type Output = R;

        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Loops(f))
}
