//! By the matrix units: 32 rows times 32 outputs in four tiles of 16 x 16 sums, 32 terms at a time. The instructions are written
//! as text, for the compiler does not offer them yet.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::{Block, PANEL, STEP};

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
pub(super) unsafe fn block(p: &Block<'_>) {
    let terms = p.b.len() / PANEL * 2;
    assert!(terms.is_multiple_of(STEP) && (p.rows == 0 || p.a.len() >= (p.rows - 1) * p.stride + terms));
    let mut row = 0;
    while row < p.rows {
        let rows = [SIDE.min(p.rows - row), SIDE.min((p.rows - row).saturating_sub(SIDE))];
        let mut sums = [0.0f32; 2 * SIDE * PANEL];
        // SAFETY: as this function's; all memory that the tiles cover was asserted above.
        unsafe { tiles(p, row, rows, terms, &mut sums) };
        for (r, sums) in sums.chunks_exact(PANEL).take(rows[0] + rows[1]).enumerate() {
            p.store(row + r, sums);
        }
        row += rows[0] + rows[1];
    }
    // SAFETY: gives the tiles' state up; a thread that holds it is slower to switch.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Sums `[rows, 32]` of one or two tiles of rows.
///
/// # Safety
/// [`is_there`] must have said so, and `p` must hold `rows[0] + rows[1]` rows from `row` on, of `terms` terms.
unsafe fn tiles(p: &Block<'_>, row: usize, rows: [usize; 2], terms: usize, sums: &mut [f32; 2 * SIDE * PANEL]) {
    let mut configuration =
        Configuration { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let second = rows[1].max(1);
    for (tile, of) in [rows[0], rows[0], second, second, rows[0], second, SIDE, SIDE].into_iter().enumerate() {
        configuration.row_bytes[tile] = 64;
        configuration.rows[tile] = of as u8;
    }
    let a_stride = 2 * p.stride;
    // Where there is no second tile of rows, its one row is the first one's again, and its sums are not stored.
    let (a, apart) = (p.a[row * p.stride..].as_ptr(), if rows[1] > 0 { SIDE * a_stride } else { 0 });
    // SAFETY: the caller's promises; tiles 0 to 7 are nobody else's in this thread.
    unsafe {
        asm!(
            "ldtilecfg [{configuration}]",
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
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
            "tilestored [{c} + {width}*1], tmm0",
            "tilestored [{c} + {width}*1 + 64], tmm1",
            "tilestored [{c2} + {width}*1], tmm2",
            "tilestored [{c2} + {width}*1 + 64], tmm3",
            configuration = in(reg) &raw const configuration,
            a = inout(reg) a => _,
            a2 = inout(reg) a.byte_add(apart) => _,
            a_stride = in(reg) a_stride,
            b = inout(reg) p.b.as_ptr() => _,
            b_step = const 4 * PANEL * SIDE,
            steps = inout(reg) terms / STEP => _,
            c = in(reg) sums.as_mut_ptr(),
            c2 = in(reg) sums.as_mut_ptr().add(SIDE * PANEL),
            // Bytes of a row of a panel, and of 32 sums.
            width = in(reg) 4 * PANEL,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
