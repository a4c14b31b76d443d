//! Work split over the threads of the global rayon pool.

use rayon::prelude::*;

/// A slice that several tasks write at the same time, each its own places.
pub(crate) struct Disjoint<'a> {
    data: *mut f32,
    len: usize,
    life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only used through `slice`, whose callers promise that no two tasks overlap.
unsafe impl Send for Disjoint<'_> {}
// SAFETY: as above.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    pub(crate) fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), life: std::marker::PhantomData }
    }

    /// `count` elements from `start`.
    ///
    /// # Safety
    /// No other live slice of the same object may overlap these elements.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, count: usize) -> &mut [f32] {
        assert!(start + count <= self.len, "{start} + {count} of {}", self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), count) }
    }
}

/// Rows that one task takes at least, so that small tensors stay on one thread.
fn rows_per_task(rows: usize, width: usize) -> usize {
    let enough = 16_384usize.div_ceil(width.max(1));
    rows.div_ceil(4 * rayon::current_num_threads()).max(enough)
}

/// Calls `f(first row, rows)` for pieces of `data`, a matrix of rows of `width`.
pub(crate) fn for_rows(data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_per_task(data.len() / width.max(1), width);
    if rows * width >= data.len() {
        return f(0, data);
    }
    data.par_chunks_mut(rows * width).enumerate().for_each(|(i, piece)| f(i * rows, piece));
}

/// Calls `f(i)` for every task, on all threads if there is more than one.
pub(crate) fn for_tasks(count: usize, f: impl Fn(usize) + Sync + Send) {
    if count <= 1 {
        (0..count).for_each(f);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// Runs plain loops compiled for the widest vectors that this CPU has. Only what is inlined into the closure is compiled
/// for them: functions that it calls must be `#[inline(always)]`.
macro_rules! vectorized {
    (|| $body:expr $(,)?) => {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || $body,
        )
    };
}
pub(crate) use vectorized;
