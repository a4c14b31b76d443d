//! The table of tests that all devices share.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use liger_cpu::Cpu;
use liger_testing::Part;

/// Within 1e-4; where attention and the recurrence multiply in bfloat16, within 2e-2.
#[test]
fn every_operation_agrees_with_float64() {
    for part in [Part::Rows, Part::Attention, Part::Kept, Part::Recurrence, Part::Steps] {
        liger_testing::check(&Cpu::new(), 1e-4, part);
        liger_testing::check(&Cpu::with_bfloat16(), 2e-2, part);
    }
}

#[test]
fn the_recurrence_agrees_on_drawn_sizes() {
    liger_testing::check_drawn(&Cpu::new(), 1e-4, 40);
    liger_testing::check_drawn(&Cpu::with_bfloat16(), 2e-2, 40);
}
