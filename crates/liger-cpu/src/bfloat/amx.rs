//! By the matrix units: 32 rows times 32 outputs in four tiles of 16 x 16 sums, 32 terms at a time. The instructions are written
//! as text, for the compiler does not offer them yet.
//!
//! All panels go by 32 rows before the next 32 are looked at: those rows stay in the first cache, and the sums of neighbouring
//! panels are neighbours.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::{Block, PANEL, STEP, Work};

const SIDE: usize = 16;

/// Whether the CPU has tiles for bfloat16 and the system lets this program use them.
pub(super) fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        // Leaf 7, EDX: bit 22 bfloat16 products, bit 24 tiles.
        let features = __cpuid_count(7, 0).edx;
        features >> 22 & 1 == 1 && features >> 24 & 1 == 1 && may_use_tiles()
    })
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

/// Palette 1, with rows and bytes a row of the eight tiles: 0 to 3 are sums, 4 and 5 rows, 6 and 7 outputs.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// # Safety
/// [`is_there`] must have said so.
pub(super) unsafe fn multiply(work: Work<'_>) {
    let terms = work.terms;
    assert!(terms.is_multiple_of(STEP) && (work.rows == 0 || work.a.len() >= (work.rows - 1) * work.stride + terms));
    let mut apart = [0.0f32; 2 * SIDE * PANEL];
    let mut configured = [0; 2];
    let mut row = 0;
    while row < work.rows {
        let rows = [SIDE.min(work.rows - row), SIDE.min((work.rows - row).saturating_sub(SIDE))];
        if rows != configured {
            // SAFETY: as this function's.
            unsafe { configure(rows) };
            configured = rows;
        }
        let last = row + rows[0] + rows[1];
        for p in work.panels() {
            // Sums of whole panels go straight to where they belong.
            if p.scale == 1.0 && p.count == PANEL {
                // Both ends are looked at; the tiles write the panel's columns of the rows between.
                let (first, _) = (p.outputs(row).as_mut_ptr(), p.outputs(last - 1));
                // SAFETY: as this function's; all memory that the tiles cover was looked at.
                unsafe { tiles(&p, row, rows, terms, (first, p.width), p.accumulate) };
            } else {
                // SAFETY: as above.
                unsafe { tiles(&p, row, rows, terms, (apart.as_mut_ptr(), PANEL), false) };
                apart.chunks_exact(PANEL).zip(row..last).for_each(|(sums, row)| p.store(row, sums));
            }
        }
        row = last;
    }
    // SAFETY: gives the tiles' state up; a thread that holds it is slower to switch.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Tiles for so many rows.
///
/// # Safety
/// [`is_there`] must have said so.
unsafe fn configure(rows: [usize; 2]) {
    let mut configuration =
        Configuration { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let second = rows[1].max(1);
    for (tile, of) in [rows[0], rows[0], second, second, rows[0], second, SIDE, SIDE].into_iter().enumerate() {
        configuration.row_bytes[tile] = 64;
        configuration.rows[tile] = of as u8;
    }
    // SAFETY: the caller's promise; the tiles are nobody else's in this thread.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
}

/// Sums `[rows, 32]` of one or two tiles of rows, to `c` with rows so many floats apart, or added to what is there.
///
/// # Safety
/// The tiles must be configured for `rows`; `p` must hold that many rows from `row` on, of `terms` terms, and `c` have place
/// for them.
unsafe fn tiles(
    p: &Block<'_>,
    row: usize,
    rows: [usize; 2],
    terms: usize,
    (c, c_width): (*mut f32, usize),
    accumulate: bool,
) {
    // Where there is no second tile of rows, it is the first row again, and so are its sums.
    let second = if rows[1] > 0 { SIDE } else { 0 };
    let a = p.a[row * p.stride..].as_ptr();
    // SAFETY: the caller's promises.
    unsafe {
        asm!(
            "test {accumulate}, {accumulate}", "jnz 3f",
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "jmp 2f",
            "3:",
            "tileloadd tmm0, [{c} + {c_stride}*1]",
            "tileloadd tmm1, [{c} + {c_stride}*1 + 64]",
            "tileloadd tmm2, [{c2} + {c_stride}*1]",
            "tileloadd tmm3, [{c2} + {c_stride}*1 + 64]",
            "2:",
            "tileloadd tmm6, [{b} + {width}*1]",
            "tileloadd tmm4, [{a} + {a_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {width}*1 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a2} + {a_stride}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64", "add {a2}, 64", "add {b}, {b_step}",
            "dec {steps}", "jnz 2b",
            // The second tiles first: where they are the first row again, the first ones overwrite it.
            "tilestored [{c2} + {c_stride}*1], tmm2",
            "tilestored [{c2} + {c_stride}*1 + 64], tmm3",
            "tilestored [{c} + {c_stride}*1], tmm0",
            "tilestored [{c} + {c_stride}*1 + 64], tmm1",
            accumulate = in(reg) usize::from(accumulate),
            a = inout(reg) a => _,
            a2 = inout(reg) a.add(second * p.stride) => _,
            a_stride = in(reg) 2 * p.stride,
            b = inout(reg) p.b.as_ptr() => _,
            b_step = const 4 * PANEL * SIDE,
            // Bytes of a row of a panel.
            width = in(reg) 4 * PANEL,
            steps = inout(reg) terms / STEP => _,
            c = in(reg) c,
            c2 = in(reg) c.add(second * c_width),
            c_stride = in(reg) 4 * c_width,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
