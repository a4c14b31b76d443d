//! AMX's tiles of registers: whether this program may use them, and how they are shaped. The instructions are written as text wherever
//! they are used, for the compiler does not offer them yet.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Most rows of a tile; a row has at most 64 bytes.
pub(crate) const SIDE: usize = 16;

/// Products that a CPU's tiles have: bits of EDX in CPUID's leaf 7.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Products {
    Bfloat16 = 22,
    Bytes = 25,
}

/// Whether the CPU has tiles with these products and the system lets this program use them.
pub(crate) fn are_there(products: Products) -> bool {
    const TILES: u32 = 24;
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    let features = __cpuid_count(7, 0).edx;
    let has = |bit: u32| features >> bit & 1 == 1;
    has(TILES) && has(products as u32) && *ALLOWED.get_or_init(may_use_tiles)
}

/// Linux hands out the tiles' 8 KiB of state on request, once a program.
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let outcome: isize;
    // SAFETY: a system call that only changes what this program may use.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => outcome, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _, options(nostack));
    }
    outcome == 0
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// Palette 1, with rows and bytes a row of the eight tiles.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Shapes the first tiles, by rows and bytes of a row.
///
/// # Safety
/// [`are_there`] must have said so; what is in the tiles is lost.
pub(crate) unsafe fn configure(shapes: &[(u8, u16)]) {
    let mut configuration =
        Configuration { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (tile, &(rows, row_bytes)) in shapes.iter().enumerate() {
        (configuration.rows[tile], configuration.row_bytes[tile]) = (rows, row_bytes);
    }
    // SAFETY: the caller's promise; the tiles are nobody else's in this thread.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
}

/// Gives the tiles' state up; a thread that holds it is slower to switch.
///
/// # Safety
/// As [`configure`].
pub(crate) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
