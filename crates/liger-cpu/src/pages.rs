//! Memory that is gone through from end to end again and again, in large pages where the system has them.

use std::io::Result;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::{MmapMut, MmapOptions};

/// Some elements, at first zero.
pub(crate) struct Pages<T> {
    map: MmapMut,
    bytes: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Pages<T> {
    pub(crate) fn zeroed(count: usize) -> Result<Self> {
        let bytes = count * size_of::<T>();
        let map = MmapOptions::new().len(bytes.max(1)).map_anon()?;
        // A wish: a system without large pages gives small ones.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map, bytes, element: PhantomData })
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[..self.bytes])
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[..self.bytes])
    }
}
