//! The gated recurrence on both axes: chunks against single steps in float64, any split, initial and final states, and
//! every gradient.

use liger_tensor::{GateAxis, Recurrence, RecurrenceGradients, Sequences, Tensor};
use proptest::prelude::any;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use crate::{Check, Numbers};

/// Sizes of one sequence.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    t: usize,
    kv: usize,
    group: usize,
    dk: usize,
    dv: usize,
    axis: GateAxis,
}

struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    gate: Vec<f64>,
    state: Vec<f64>,
}

impl Sizes {
    fn gate_dim(self) -> usize {
        if self.axis == GateAxis::Key { self.dk } else { self.dv }
    }

    fn inputs(self, strong: bool, seed: u64) -> Inputs {
        let mut n = Numbers::new(seed + (self.t * self.dk + self.dv) as u64);
        let rows = self.t * self.kv;
        Inputs {
            q: n.normal(rows * self.group * self.dk),
            k: n.normal(rows * self.dk),
            v: n.normal(rows * self.dv),
            gate: n.log_gates(rows * self.gate_dim(), strong),
            state: n.normal(self.kv * self.dk * self.dv),
        }
    }

    /// Index of the gate of token t, head, for state element (a, b).
    fn gate_at(self, t: usize, head: usize, a: usize, b: usize) -> usize {
        (t * self.kv + head) * self.gate_dim() + if self.axis == GateAxis::Key { a } else { b }
    }

    /// o_t = q_t S_t; also the state after every token, the initial one first.
    fn forward(self, x: &Inputs) -> (Vec<f64>, Vec<Vec<f64>>) {
        let Self { t, kv, group, dk, dv, .. } = self;
        let mut out = vec![0.0; t * kv * group * dv];
        let mut states = vec![x.state.clone()];
        for i in 0..t {
            let mut s = states[i].clone();
            for head in 0..kv {
                for a in 0..dk {
                    for b in 0..dv {
                        let at = (head * dk + a) * dv + b;
                        let write = x.k[(i * kv + head) * dk + a] * x.v[(i * kv + head) * dv + b];
                        s[at] = x.gate[self.gate_at(i, head, a, b)].exp() * s[at] + write;
                        for g in 0..group {
                            let row = (i * kv + head) * group + g;
                            out[row * dv + b] += x.q[row * dk + a] * s[at];
                        }
                    }
                }
            }
            states.push(s);
        }
        (out, states)
    }

    /// Gradients of q, k, v, gate and initial state, step by step backwards.
    fn backward(self, x: &Inputs, states: &[Vec<f64>], dout: &[f64], dfinal: &[f64]) -> [Vec<f64>; 5] {
        let Self { t, kv, group, dk, dv, .. } = self;
        let (mut dq, mut dkey, mut dvalue, mut dgate) =
            (vec![0.0; x.q.len()], vec![0.0; x.k.len()], vec![0.0; x.v.len()], vec![0.0; x.gate.len()]);
        let mut ds = dfinal.to_vec();
        for i in (0..t).rev() {
            for head in 0..kv {
                for a in 0..dk {
                    for b in 0..dv {
                        let at = (head * dk + a) * dv + b;
                        for g in 0..group {
                            let row = (i * kv + head) * group + g;
                            dq[row * dk + a] += dout[row * dv + b] * states[i + 1][at];
                            ds[at] += x.q[row * dk + a] * dout[row * dv + b];
                        }
                        let (key, value) = ((i * kv + head) * dk + a, (i * kv + head) * dv + b);
                        dkey[key] += ds[at] * x.v[value];
                        dvalue[value] += ds[at] * x.k[key];
                        let gate = self.gate_at(i, head, a, b);
                        dgate[gate] += ds[at] * states[i][at] * x.gate[gate].exp();
                        ds[at] *= x.gate[gate].exp();
                    }
                }
            }
        }
        [dq, dkey, dvalue, dgate, ds]
    }
}

pub(crate) fn check(c: &Check<'_>) {
    for axis in [GateAxis::Key, GateAxis::Value] {
        for (t, kv, group, dk, dv) in [
            (1, 1, 1, 16, 16),
            (2, 2, 3, 16, 8),
            (63, 1, 3, 32, 32),
            (64, 2, 1, 60, 60),
            (65, 1, 4, 64, 64),
            (200, 2, 3, 16, 24),
            (130, 1, 1, 128, 128),
        ] {
            let sizes = Sizes { t, kv, group, dk, dv, axis };
            for strong in [false, true] {
                one_case(c, sizes, strong, 0, &[vec![t], vec![1; t], vec![t / 2, t - t / 2], vec![t - 1, 1]]);
            }
        }
    }
}

/// Sizes, gates and splits drawn by proptest, which shrinks what fails.
pub(crate) fn check_drawn(c: &Check<'_>, cases: u32) {
    let lengths = select(&[1usize, 2, 63, 64, 65, 200][..]);
    let dims = || select(&[16usize, 32, 60, 64, 128][..]);
    let axes = select(&[GateAxis::Key, GateAxis::Value][..]);
    let cuts = proptest::collection::vec(1usize..200, 0..5);
    let drawn = (lengths, select(&[1usize, 3, 4][..]), dims(), dims(), axes, any::<bool>(), 0..1000u64, cuts);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&drawn, |(t, group, dk, dv, axis, strong, seed, mut cuts)| {
        cuts.retain(|&cut| cut < t);
        cuts.extend([0, t]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|w| w[1] - w[0]).collect();
        one_case(c, Sizes { t, kv: 1, group, dk, dv, axis }, strong, seed, &[pieces]);
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}"));
}

/// The text goes through in each of the `splits`.
fn one_case(c: &Check<'_>, s: Sizes, strong: bool, seed: u64, splits: &[Vec<usize>]) {
    let what = format!("recurrence {s:?}, strong gates {strong}");
    let x = s.inputs(strong, seed);
    let (expected, states) = s.forward(&x);
    let heads = s.kv * s.group;
    for pieces in splits {
        // Two slots; the text goes through the second.
        let initial: Vec<f64> = std::iter::repeat_n(0.0, x.state.len()).chain(x.state.iter().copied()).collect();
        let mut state = c.exact(&initial, &[2, s.kv, s.dk, s.dv]);
        let (mut found, mut done) = (Vec::new(), 0);
        for piece in pieces.iter().copied().filter(|&p| p > 0) {
            let part =
                |x: &[f64], h: usize, d: usize| c.tensor(&x[done * h * d..(done + piece) * h * d], &[piece, h, d]);
            let mut sequences = Sequences::default();
            sequences.push(piece, done, 1);
            let mut out = c.poisoned(&[piece, heads, s.dv]);
            let (q, k, v) = (part(&x.q, heads, s.dk), part(&x.k, s.kv, s.dk), part(&x.v, s.kv, s.dv));
            let gates = &x.gate[done * s.kv * s.gate_dim()..(done + piece) * s.kv * s.gate_dim()];
            let log_gate = c.exact(gates, &[piece, s.kv, s.gate_dim()]);
            let inputs = Recurrence { q: &q, k: &k, v: &v, log_gate: &log_gate, axis: s.axis, sequences: &sequences };
            c.ops.gated_recurrence_forward(&mut out, inputs, Some(&mut state), None).expect(&what);
            found.extend(c.ops.download(&out).expect("download").iter().map(|&x| f64::from(x)));
            done += piece;
        }
        c.close(&format!("{what}: output in {} pieces", pieces.len()), &c.exact(&found, &[found.len()]), &expected);
        let mut last = c.poisoned_exact(&[1, s.kv, s.dk, s.dv]);
        c.ops.copy_rows(&mut last, &state, 1).expect("copy_rows");
        c.close(&format!("{what}: final state"), &last, &states[s.t]);
    }

    let mut numbers = Numbers::new(11);
    let (dout, dfinal) = (numbers.normal(expected.len()), numbers.normal(x.state.len()));
    let expected = s.backward(&x, &states, &dout, &dfinal);
    let tensor = |x: &[f64], h: usize, d: usize| c.tensor(x, &[s.t, h, d]);
    let (q, k, v) = (tensor(&x.q, heads, s.dk), tensor(&x.k, s.kv, s.dk), tensor(&x.v, s.kv, s.dv));
    let log_gate = c.exact(&x.gate, &[s.t, s.kv, s.gate_dim()]);
    let (mut dq, mut dk, mut dv) = (c.poisoned(q.shape()), c.poisoned(k.shape()), c.poisoned(v.shape()));
    let mut dgate = c.poisoned_exact(log_gate.shape());
    let shape = [1, s.kv, s.dk, s.dv];
    let (initial, mut dstate) = (c.exact(&x.state, &shape), c.exact(&dfinal, &shape));
    let sequences = Sequences::fresh([s.t]);
    let inputs = Recurrence { q: &q, k: &k, v: &v, log_gate: &log_gate, axis: s.axis, sequences: &sequences };
    let gradients =
        RecurrenceGradients { q: &mut dq, k: &mut dk, v: &mut dv, log_gate: &mut dgate, state: Some(&mut dstate) };
    c.ops.gated_recurrence_backward(gradients, inputs, Some(&initial), None, &tensor(&dout, heads, s.dv)).expect(&what);
    for ((found, expected), name) in
        [&dq, &dk, &dv, &dgate, &dstate].into_iter().zip(&expected).zip(["q", "k", "v", "gate", "state"])
    {
        c.close(&format!("{what}: gradient of {name}"), found, expected);
    }

    // With what the forward kept, the same gradients.
    let Some(mut kept) = c.ops.recurrence_states(inputs).expect(&what) else { return };
    let mut out = c.poisoned(&[s.t, heads, s.dv]);
    c.ops.gated_recurrence_forward(&mut out, inputs, None, Some(&mut kept)).expect(&what);
    let mut gradients = |kept: Option<&Tensor>| {
        let d = RecurrenceGradients { q: &mut dq, k: &mut dk, v: &mut dv, log_gate: &mut dgate, state: None };
        c.ops.gated_recurrence_backward(d, inputs, None, kept, &tensor(&dout, heads, s.dv)).expect(&what);
        [&dq, &dk, &dv, &dgate].map(|x| c.ops.download(x).expect("download"))
    };
    assert!(gradients(Some(&kept)) == gradients(None), "{what}: gradients from kept states");
}
