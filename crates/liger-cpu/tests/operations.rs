//! The table of tests that all devices share.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[test]
fn every_operation_agrees_with_float64() {
    liger_testing::check_all(&liger_cpu::Cpu::new(), 1e-4);
}

#[test]
fn the_recurrence_agrees_on_drawn_sizes() {
    liger_testing::check_drawn(&liger_cpu::Cpu::new(), 1e-4, 40);
}
