//! One GPU through the driver: context, stream, memory that is kept for the next tensor, kernels by name.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{DriverError, result, sys};
use liger_tensor::{DeviceMemory, Error, Result};

use crate::compile::{Source, Variant, compile_cached};

/// A kernel: its file and name.
pub(crate) type Kernel = (Source, &'static str);

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(crate) enum Arg<'a> {
    Pointer(u64),
    Int(i32),
    Long(i64),
    Float(f32),
    /// A structure of 4-byte members.
    Words(&'a [i32]),
}

pub(crate) fn long(n: usize) -> Arg<'static> {
    Arg::Long(n as i64)
}

pub(crate) fn int(n: usize) -> Arg<'static> {
    Arg::Int(n as i32)
}

/// Grid, block and bytes of dynamic shared memory.
pub(crate) struct Launch {
    pub(crate) grid: (u32, u32, u32),
    pub(crate) block: (u32, u32),
    pub(crate) shared: usize,
}

impl Launch {
    /// One thread for each of `n` elements, `per_thread` at a time.
    pub(crate) fn over(n: usize, per_thread: usize) -> Self {
        Self { grid: (n.div_ceil(256 * per_thread) as u32, 1, 1), block: (256, 1), shared: 0 }
    }

    /// One warp for each row.
    pub(crate) fn warp_rows(rows: usize) -> Self {
        Self { grid: (rows.div_ceil(8) as u32, 1, 1), block: (32, 8), shared: 0 }
    }
}

/// A GPU. Everything runs in one stream, so memory that is given back can be reused at once.
pub(crate) struct Gpu {
    context: sys::CUcontext,
    pub(crate) stream: sys::CUstream,
    pub(crate) name: String,
    pub(crate) arch: String,
    driver_version: i32,
    pub(crate) largest_shared: usize,
    /// Multiprocessors.
    pub(crate) processors: usize,
    kernels: Mutex<Kernels>,
    pool: Mutex<Pool>,
    profile: Mutex<Option<Vec<Span>>>,
}

/// Work between two events.
struct Span {
    name: String,
    start: sys::CUevent,
    end: sys::CUevent,
}

// SAFETY: an event handle is a plain name of the driver's.
unsafe impl Send for Span {}

#[derive(Default)]
struct Kernels {
    modules: HashMap<(Source, Variant), Module>,
    functions: HashMap<(Kernel, Variant), Function>,
}

#[derive(Clone, Copy)]
struct Module(sys::CUmodule);
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

#[derive(Default)]
struct Pool {
    /// Blocks that nobody uses, by their bytes.
    free: BTreeMap<usize, Vec<u64>>,
    /// Bytes taken from the driver.
    held: usize,
    /// Of `held`, once it has been settled.
    most: Option<usize>,
    in_use: usize,
    peak: usize,
    /// Blocks taken from the driver so far.
    taken: usize,
}

// SAFETY: handles of the driver may be used from any thread once the context is current, which `bind` sees to.
unsafe impl Send for Gpu {}
// SAFETY: as above; the maps are behind locks.
unsafe impl Sync for Gpu {}
// SAFETY: a module handle is a plain name of the driver's.
unsafe impl Send for Module {}
// SAFETY: as for modules.
unsafe impl Send for Function {}

/// Recorded work.
pub(crate) struct Graph(sys::CUgraphExec);

// SAFETY: a plain name of the driver's.
unsafe impl Send for Graph {}
// SAFETY: it is only launched, into one stream.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver waits for a launch that is under way.
        let _ = unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}

/// Device memory that goes back to its GPU's pool when it is dropped.
pub(crate) struct Block {
    pub(crate) pointer: u64,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl DeviceMemory for Block {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut pool = self.gpu.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.in_use -= self.bytes;
        pool.free.entry(self.bytes).or_default().push(self.pointer);
        if pool.most.is_some_and(|most| pool.held > most) {
            // An error of earlier work comes up again at the next call that reports one.
            let _ = self.gpu.free_all(&mut pool);
        }
    }
}

/// An error of the driver during `operation`.
pub(crate) fn failed(operation: &str) -> impl Fn(DriverError) -> Error {
    let operation = operation.to_owned();
    move |e| {
        let message = e.error_string().map_or_else(|_| format!("{e:?}"), |s| s.to_string_lossy().into_owned());
        Error::Device { operation: operation.clone(), message }
    }
}

impl Gpu {
    /// Opens GPU number `ordinal`.
    pub(crate) fn open(ordinal: i32) -> std::result::Result<Self, String> {
        crate::libraries::open_all()?;
        let text =
            |e: DriverError| e.error_string().map_or_else(|_| format!("{e:?}"), |s| s.to_string_lossy().into_owned());
        result::init().map_err(|e| format!("the NVIDIA driver does not start: {}", text(e)))?;
        let count = result::device::get_count().map_err(text)?;
        if ordinal >= count {
            return Err(format!("GPU {ordinal} is not there; this machine has {count}"));
        }
        let device = result::device::get(ordinal).map_err(text)?;
        let name = result::device::get_name(device).map_err(text)?;
        use sys::CUdevice_attribute as Attribute;
        // SAFETY: `device` is a valid device.
        let attribute = |a: Attribute| unsafe { result::device::get_attribute(device, a) }.map_err(text);
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(format!("{name} has compute capability {major}.{minor}; 8.0 (Ampere) or later is needed"));
        }
        let largest_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let mut driver_version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut driver_version) }.result().map_err(text)?;
        // SAFETY: `device` is valid; the context lives until the process ends.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(text)?;
        // SAFETY: the context was just made.
        unsafe { result::ctx::set_current(context) }.map_err(text)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(text)?;
        // The machine code of Hopper's own instructions is not compatible with later chips.
        let arch = format!("sm_{major}{minor}{}", if major == 9 { "a" } else { "" });
        let (kernels, pool, profile) = Default::default();
        Ok(Self { context, stream, name, arch, driver_version, largest_shared, processors, kernels, pool, profile })
    }

    /// Whether the blocks of a cluster can read each other's shared memory: since Hopper.
    pub(crate) fn has_clusters(&self) -> bool {
        !self.arch.starts_with("sm_8")
    }

    /// Makes the context current on this thread.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("use the GPU"))
    }

    /// Memory of at least `bytes`, not set.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        let mut bytes = bytes.max(1).next_multiple_of(512);
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        // Work that repeats itself finds blocks of just its sizes; once memory is settled, a larger one will do.
        let largest = if pool.most.is_some() { usize::MAX } else { bytes };
        let found = pool.free.range_mut(bytes..=largest).find_map(|(&size, list)| Some((size, list.pop()?)));
        let pointer = match found {
            Some((size, pointer)) => {
                bytes = size;
                pointer
            }
            None => {
                self.bind()?;
                if pool.most.is_some_and(|most| pool.held + bytes > most) {
                    self.free_all(&mut pool)?;
                }
                let pointer = self.fresh(&mut pool, bytes)?;
                pool.held += bytes;
                pool.taken += 1;
                pointer
            }
        };
        pool.in_use += bytes;
        pool.peak = pool.peak.max(pool.in_use);
        Ok(Block { pointer, bytes, gpu: self.clone() })
    }

    fn fresh(&self, pool: &mut Pool, bytes: usize) -> Result<u64> {
        // SAFETY: plain allocation; freed in `trim`.
        if let Ok(pointer) = unsafe { result::malloc_sync(bytes) } {
            return Ok(pointer);
        }
        self.free_all(pool)?;
        // SAFETY: as above.
        unsafe { result::malloc_sync(bytes) }.map_err(|_| {
            let (free, total) = result::mem_get_info().unwrap_or((0, 0));
            Error::OutOfMemory { device: self.name.clone(), needed: bytes, free, total }
        })
    }

    fn free_all(&self, pool: &mut Pool) -> Result<()> {
        self.synchronize()?;
        for (bytes, pointers) in std::mem::take(&mut pool.free) {
            for pointer in pointers {
                pool.held -= bytes;
                // SAFETY: nobody holds the block, and the stream is idle.
                unsafe { result::free_sync(pointer) }.map_err(failed("free memory"))?;
            }
        }
        Ok(())
    }

    /// Gives memory that no tensor holds back to the driver.
    pub(crate) fn trim(&self) -> Result<()> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        self.free_all(&mut pool)?;
        pool.peak = pool.in_use;
        Ok(())
    }

    /// What the pool holds now is the most that it keeps.
    pub(crate) fn settle(&self) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.most = Some(pool.held);
    }

    /// Bytes that the pool holds, in use or not.
    pub(crate) fn held_bytes(&self) -> usize {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).held
    }

    /// Most bytes that tensors held at once since the last `trim`.
    pub(crate) fn peak_bytes(&self) -> usize {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).peak
    }

    /// Blocks of memory taken from the driver so far, given back or not.
    pub(crate) fn blocks_taken(&self) -> usize {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).taken
    }

    /// Bytes free, counting what the pool could give back, and all there are.
    pub(crate) fn memory(&self) -> Option<(usize, usize)> {
        self.bind().ok()?;
        let (free, total) = result::mem_get_info().ok()?;
        let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        Some((free + pool.held - pool.in_use, total))
    }

    /// Waits for all work.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("wait for the GPU"))
    }

    /// Copies host data to the start of a block.
    pub(crate) fn write<T: Copy>(&self, block: &Block, data: &[T]) -> Result<()> {
        self.bind()?;
        debug_assert!(std::mem::size_of_val(data) <= block.bytes);
        // SAFETY: the block is large enough, and pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(block.pointer, data, self.stream) }.map_err(failed("copy to the GPU"))
    }

    /// Copies the start of a block to the host.
    pub(crate) fn read<T: Copy + Default>(&self, pointer: u64, count: usize) -> Result<Vec<T>> {
        self.bind()?;
        let mut data = vec![T::default(); count];
        // SAFETY: the caller's block holds `count` elements; the copy is waited for before `data` is looked at.
        unsafe { result::memcpy_dtoh_async(&mut data, pointer, self.stream) }.map_err(failed("copy from the GPU"))?;
        self.synchronize()?;
        Ok(data)
    }

    /// Copies between blocks.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: callers check the ranges against their tensors.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(failed("copy on the GPU"))
    }

    /// Sets bytes to zero.
    pub(crate) fn clear(&self, pointer: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: callers check the range against their tensors.
        unsafe { result::memset_d8_async(pointer, 0, bytes, self.stream) }.map_err(failed("clear memory"))
    }

    fn function(&self, kernel: Kernel, variant: Variant) -> Result<Function> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = kernels.functions.get(&(kernel, variant)) {
            return Ok(function);
        }
        let (source, name) = kernel;
        let trouble = |message: String| Error::Device { operation: format!("kernel {name}"), message };
        let module = match kernels.modules.get(&(source, variant)) {
            Some(&module) => module,
            None => {
                let code = compile_cached(source, variant, &self.arch, self.driver_version).map_err(trouble)?;
                // SAFETY: `code` is a whole cubin.
                let module =
                    unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(failed("load kernels"))?;
                kernels.modules.insert((source, variant), Module(module));
                Module(module)
            }
        };
        let symbol = CString::new(name).map_err(|e| trouble(e.to_string()))?;
        // SAFETY: the module stays loaded.
        let function = unsafe { result::module::get_function(module.0, symbol) }.map_err(failed(name))?;
        use sys::CUfunction_attribute as Attribute;
        // SAFETY: the function is valid; the attribute only allows more.
        let fixed = unsafe {
            result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        };
        let most = self.largest_shared as i32 - fixed.unwrap_or(0);
        // SAFETY: as above.
        unsafe {
            result::function::set_function_attribute(
                function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                most,
            )
        }
        .map_err(failed(name))?;
        kernels.functions.insert((kernel, variant), Function(function));
        Ok(Function(function))
    }

    /// Starts a kernel.
    pub(crate) fn launch(&self, kernel: Kernel, variant: Variant, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        let Launch { grid, block, shared } = launch;
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        self.bind()?;
        if shared > self.largest_shared {
            let message = format!("needs {shared} bytes of shared memory, this GPU has {}", self.largest_shared);
            return Err(Error::Device { operation: kernel.1.to_owned(), message });
        }
        let function = self.function(kernel, variant)?;
        let mut pointers: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::Int(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::Long(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::Float(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::Words(x) => x.as_ptr().cast_mut().cast(),
            })
            .collect();
        let block = (block.0, block.1, 1);
        let span = self.begin_span(|| kernel.1.to_owned())?;
        // SAFETY: the arguments are those of the kernel, and live until the call returns; sizes were checked by the
        // operation that launches.
        unsafe { result::launch_kernel(function.0, grid, block, shared as u32, self.stream, &mut pointers) }
            .map_err(failed(kernel.1))?;
        self.end_span(span)
    }

    /// Records what `run` starts instead of doing it. Kernels must have been loaded, and nothing may be allocated afresh.
    /// `None` while a profile is taken, which records events of its own.
    pub(crate) fn record(&self, run: &mut dyn FnMut() -> Result<()>) -> Result<Option<Graph>> {
        if self.profile.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(None);
        }
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid and not recording: nothing else uses it while `run` runs.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("record a step"))?;
        let outcome = run();
        // SAFETY: ends what was begun above.
        let graph = unsafe { result::stream::end_capture(self.stream) }.map_err(failed("record a step"));
        outcome?;
        let graph = graph?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was just recorded; the executable one does not need it once it is made.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }.result();
        // SAFETY: as above; destroyed once.
        let _ = unsafe { sys::cuGraphDestroy(graph) };
        made.map_err(failed("record a step"))?;
        Ok(Some(Graph(executable)))
    }

    /// Does recorded work.
    pub(crate) fn replay(&self, graph: &Graph) -> Result<()> {
        self.bind()?;
        // SAFETY: the graph is whole; whoever keeps it keeps the memory that it works on.
        unsafe { sys::cuGraphLaunch(graph.0, self.stream) }.result().map_err(failed("replay a step"))
    }

    /// From now on the time of everything that runs is taken.
    pub(crate) fn start_profile(&self) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// Name, number of runs and milliseconds, longest first, since [`Gpu::start_profile`].
    pub(crate) fn finish_profile(&self) -> Result<Vec<(String, usize, f64)>> {
        self.synchronize()?;
        let spans = self.profile.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut sums: HashMap<String, (usize, f64)> = HashMap::new();
        for span in spans.unwrap_or_default() {
            // SAFETY: both events were recorded, and the stream is idle; they are destroyed once.
            let time = unsafe { result::event::elapsed(span.start, span.end) }.map_err(failed("profile"))?;
            // SAFETY: as above.
            let _ = unsafe { (result::event::destroy(span.start), result::event::destroy(span.end)) };
            let sum = sums.entry(span.name).or_default();
            *sum = (sum.0 + 1, sum.1 + f64::from(time));
        }
        let mut list: Vec<_> = sums.into_iter().map(|(name, (count, time))| (name, count, time)).collect();
        list.sort_by(|a, b| b.2.total_cmp(&a.2));
        Ok(list)
    }

    /// Marks the beginning of a span, if a profile is taken.
    pub(crate) fn begin_span(&self, name: impl Fn() -> String) -> Result<Option<(String, sys::CUevent)>> {
        if self.profile.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return Ok(None);
        }
        Ok(Some((name(), self.event()?)))
    }

    pub(crate) fn end_span(&self, span: Option<(String, sys::CUevent)>) -> Result<()> {
        let Some((name, start)) = span else { return Ok(()) };
        let end = self.event()?;
        if let Some(list) = &mut *self.profile.lock().unwrap_or_else(PoisonError::into_inner) {
            list.push(Span { name, start, end });
        }
        Ok(())
    }

    fn event(&self) -> Result<sys::CUevent> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("profile"))?;
        // SAFETY: event and stream are valid.
        unsafe { result::event::record(event, self.stream) }.map_err(failed("profile"))?;
        Ok(event)
    }
}
