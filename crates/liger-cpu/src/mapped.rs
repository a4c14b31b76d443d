//! Weights that stay in their file: what the system has in its cache is used where it is.

use std::fs::File;
use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;
use half::bf16;
use liger_tensor::{Buffer, DType, Error, Result, Storage, Tensor};
use memmap2::{Mmap, MmapOptions};

use crate::parallel::{for_rows, vectorized};

/// A part of a file as elements of one type.
struct Mapped<T> {
    map: Mmap,
    element: PhantomData<T>,
}

impl<T: Pod> AsRef<[T]> for Mapped<T> {
    fn as_ref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map)
    }
}

fn map<T: Pod + Send + Sync>(file: &File, start: u64, count: usize) -> Result<Option<Mapped<T>>> {
    let failed = |e: std::io::Error| Error::Device { operation: "map the weights".into(), message: e.to_string() };
    // SAFETY: files of weights are replaced, never changed in place, by this program; whoever changes one while it is in use
    // gets other numbers, as with every program that maps its weights.
    let map = unsafe { MmapOptions::new().offset(start).len(count * size_of::<T>()).map(file) }.map_err(failed)?;
    let is_aligned = bytemuck::try_cast_slice::<u8, T>(&map).is_ok();
    Ok(is_aligned.then_some(Mapped { map, element: PhantomData }))
}

/// The matrix of type `stored` that begins at `start`, in `dtype`; `None` if it cannot be used or converted where it is.
pub(crate) fn tensor(
    (file, start): (&File, u64),
    stored: DType,
    shape: &[usize],
    dtype: DType,
) -> Result<Option<Tensor>> {
    let count = shape.iter().product();
    if count == 0 || cfg!(target_endian = "big") {
        return Ok(None);
    }
    let storage = match (stored, dtype) {
        (DType::F32, DType::F32) => {
            map::<f32>(file, start, count)?.map(|mapped| Storage::F32(Buffer::Shared(Arc::new(mapped))))
        }
        (DType::Bf16, DType::Bf16) => {
            map::<bf16>(file, start, count)?.map(|mapped| Storage::Bf16(Buffer::Shared(Arc::new(mapped))))
        }
        (DType::Bf16, DType::F32) => map::<bf16>(file, start, count)?.map(|mapped| {
            let mut wide = vec![0.0f32; count];
            for_rows(&mut wide, 1, |first, wide| {
                let narrow = &mapped.as_ref()[first..first + wide.len()];
                vectorized!(|| {
                    wide.iter_mut().zip(narrow).for_each(|(w, x)| *w = f32::from_bits(u32::from(x.to_bits()) << 16));
                },);
            });
            Storage::F32(wide.into())
        }),
        _ => None,
    };
    Ok(storage.map(|storage| Tensor::host(shape, storage)))
}
