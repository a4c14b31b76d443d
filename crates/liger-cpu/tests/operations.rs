//! The table of tests that all devices share.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use liger_testing::Part;

#[test]
fn every_operation_agrees_with_float64() {
    for part in [Part::Rows, Part::Attention, Part::Kept, Part::Recurrence, Part::Steps] {
        liger_testing::check(&liger_cpu::Cpu::new(), 1e-4, part);
    }
}

#[test]
fn the_recurrence_agrees_on_drawn_sizes() {
    liger_testing::check_drawn(&liger_cpu::Cpu::new(), 1e-4, 40);
}
