//! One more token for each of some texts. Where the device has whole decoding steps and the model suits them, a step is
//! five operations a layer on memory that stays in place, recorded once for each number of texts and replayed. All numbers
//! of texts work in the same memory.

use std::sync::Arc;

use liger_tensor::{
    DType, DeviceMemory, KeyValueCache, LigerStep, Recording, Sequences, StepForm, StepLinear, StepOps, StepSpec,
    Tensor,
};

use crate::adapter::{Adapter, Target};
use crate::attention::{Form, GateSource, Liger, Mixer};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::state::{LayerState, State};
use crate::weights::{Linear, Weights};

/// What the steps of a model work on.
pub(crate) struct Steps {
    weights: Arc<Weights>,
    /// Of every layer.
    specs: Vec<StepSpec>,
    epsilon: f32,
    tokens: Box<dyn DeviceMemory>,
    frequencies: Tensor,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixed: Tensor,
    inner: Tensor,
    logits: Tensor,
    /// By the number of texts, from 1 to the most that there can be.
    known: Vec<Known>,
}

/// What there is of a step of so many texts. The first run is not recorded: it loads what has to be loaded.
enum Known {
    Nothing,
    Loaded,
    Recorded(Box<dyn Recording>),
}

impl std::fmt::Debug for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Steps of up to {} texts", self.known.len())
    }
}

impl Decoder {
    /// Takes in one token for each of these slots; logits `[slots, V]` of what comes next, in float32.
    ///
    /// # Errors
    /// [`Error::Device`] with a token that the model does not have.
    pub fn step<'s>(
        &self,
        state: &'s mut State,
        tokens: &[(usize, u32)],
        adapter: Option<&Adapter>,
    ) -> Result<&'s Tensor> {
        let mut sequences = Sequences::default();
        tokens.iter().for_each(|(slot, _)| sequences.push(1, state.position(*slot), *slot));
        let ids: Vec<u32> = tokens.iter().map(|(_, id)| *id).collect();
        let Some((steps, index)) = self.steps(state, tokens.len(), adapter)? else {
            let hidden = self.forward(&ids, &sequences, Some(state), adapter)?;
            return Ok(state.logits.insert(self.logits(&hidden)?));
        };
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.config().vocab_size) {
            let vocabulary = self.config().vocab_size;
            return Err(liger_tensor::Error::TokenOutOfRange { id: i64::from(id), vocabulary }.into());
        }
        let State { layers, steps: kept, .. } = state;
        kept[index].run(steps, &ids, &sequences, layers)?;
        tokens.iter().for_each(|(slot, _)| state.advance(*slot, 1));
        Ok(&state.steps[index].logits)
    }

    /// The device's steps, and which of the state's are for this model; `None` where there are none for so many texts.
    fn steps(
        &self,
        state: &mut State,
        texts: usize,
        adapter: Option<&Adapter>,
    ) -> Result<Option<(&dyn StepOps, usize)>> {
        let Some(steps) = self.ops().steps().filter(|s| adapter.is_none() && (1..=s.most_texts()).contains(&texts))
        else {
            return Ok(None);
        };
        let Some(specs) = self.step_specs() else { return Ok(None) };
        let is_it = |s: &Steps| Arc::ptr_eq(&s.weights, self.shared_weights()) && s.specs == specs;
        if let Some(index) = state.steps.iter().position(is_it) {
            return Ok(Some((steps, index)));
        }
        let suits = state.layers.iter().zip(&specs).all(|(layer, spec)| steps.takes(spec, &layer.cache));
        if !suits || !self.has_plain_bf16_weights() {
            return Ok(None);
        }
        let most = state.slots().min(steps.most_texts());
        state.steps.push(Steps::new(self, steps, specs, most)?);
        Ok(Some((steps, state.steps.len() - 1)))
    }

    /// Settings of every layer, if all are Liger Attention in a block of the plain kind.
    fn step_specs(&self) -> Option<Vec<StepSpec>> {
        let config = self.config();
        if config.family.has_output_norms() {
            return None;
        }
        // The kernel makes the gate of the key alone.
        let is_plain = |liger: &Liger| matches!(liger.gate, GateSource::Key | GateSource::None);
        let spec = |liger: &Liger| StepSpec {
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            form: match liger.structure.form() {
                _ if liger.alpha == 0.0 => StepForm::Off,
                Form::Features(spec) => StepForm::Features(liger.gate.of_key(spec)),
                Form::Slots => StepForm::Slots(liger.slots),
                Form::Kept => StepForm::Kept,
            },
            alpha: liger.alpha,
            beta: liger.beta,
            rope_factor: self.rotations()[0].factor as f32,
            epsilon: config.rms_norm_eps,
        };
        let specs = self
            .mixers()
            .iter()
            .map(|mixer| if let Mixer::Liger(l) = mixer { is_plain(l).then(|| spec(l)) } else { None });
        specs.collect()
    }

    /// Matrices in bfloat16, of widths that are multiples of 8, with biases on q, k and v alone.
    fn has_plain_bf16_weights(&self) -> bool {
        let takes = |weight: &Tensor| weight.dtype() == DType::Bf16 && weight.dim(1).is_multiple_of(8);
        let plain = |linear: &Linear| takes(&linear.weight) && linear.bias.is_none();
        let head = self.weights().lm_head.as_ref().unwrap_or(&self.weights().embedding);
        takes(head)
            && self.weights().blocks.iter().all(|b| {
                let [q, k, v, o] = &b.attention;
                [q, k, v].iter().all(|l| takes(&l.weight)) && [o, &b.gate, &b.up, &b.down].into_iter().all(plain)
            })
    }
}

impl Steps {
    /// For up to `most` texts.
    fn new(decoder: &Decoder, steps: &dyn StepOps, specs: Vec<StepSpec>, most: usize) -> Result<Self> {
        let (ops, config) = (decoder.ops(), decoder.config());
        let heads = |count: usize| ops.empty(&[most, count * config.head_dim]);
        Ok(Self {
            weights: decoder.shared_weights().clone(),
            specs,
            epsilon: config.rms_norm_eps,
            tokens: steps.tokens(most)?,
            frequencies: decoder.rotations()[0].revolutions(ops)?,
            x: ops.empty(&[most, config.hidden_size])?,
            q: heads(config.num_heads)?,
            k: heads(config.num_kv_heads)?,
            v: heads(config.num_kv_heads)?,
            mixed: heads(config.num_heads)?,
            inner: ops.empty(&[most, config.intermediate_size])?,
            logits: ops.empty_f32(&[most, config.vocab_size])?,
            known: (0..most).map(|_| Known::Nothing).collect(),
        })
    }

    fn run(&mut self, steps: &dyn StepOps, ids: &[u32], sequences: &Sequences, layers: &[LayerState]) -> Result<()> {
        let texts = ids.len();
        steps.place(&*self.tokens, ids, sequences)?;
        let Self { x, q, k, v, mixed, inner, logits, .. } = self;
        [x, q, k, v, mixed, inner, logits].into_iter().for_each(|tensor| tensor.set_rows(texts));
        match &self.known[texts - 1] {
            Known::Recorded(recording) => return Ok(recording.replay()?),
            Known::Loaded => {
                if let Some(recording) = self.record(steps, layers)? {
                    recording.replay()?;
                    self.known[texts - 1] = Known::Recorded(recording);
                    return Ok(());
                }
            }
            Known::Nothing => self.known[texts - 1] = Known::Loaded,
        }
        self.start(steps, layers)
    }

    fn record(&mut self, steps: &dyn StepOps, layers: &[LayerState]) -> Result<Option<Box<dyn Recording>>> {
        let mut problem = None;
        let recording = steps.record(&mut || match self.start(steps, layers) {
            Err(Error::Device(e)) => Err(e),
            Err(other) => {
                problem = Some(other);
                Ok(())
            }
            Ok(()) => Ok(()),
        })?;
        problem.map_or(Ok(recording), Err)
    }

    fn start(&mut self, steps: &dyn StepOps, layers: &[LayerState]) -> Result<()> {
        let Self { weights, specs, epsilon, tokens, frequencies, x, q, k, v, mixed, inner, logits, .. } = self;
        let (tokens, epsilon) = (&**tokens, *epsilon);
        let add = |out: &mut Tensor, input: &Tensor, linear: &Linear| {
            steps.linears(&mut [StepLinear { out, weight: &linear.weight, bias: None }], input, None, true)
        };
        steps.embedding(x, &weights.embedding, tokens)?;
        for ((block, spec), LayerState { cache, recurrent }) in weights.blocks.iter().zip(specs).zip(layers) {
            let linear = |out, target: Target| {
                let Linear { weight, bias } = &block.attention[target as usize];
                StepLinear { out, weight, bias: bias.as_ref() }
            };
            let mut projections = [linear(&mut *q, Target::Q), linear(&mut *k, Target::K), linear(&mut *v, Target::V)];
            steps.linears(&mut projections, x, Some((&block.input_norm, epsilon)), false)?;
            let head_norms = block.head_norms.as_ref().map(|[q, k]| [q, k]);
            let cache: &KeyValueCache = cache;
            let step = LigerStep { spec: *spec, qkv: [q, k, v], head_norms, frequencies, cache, states: recurrent };
            steps.liger(mixed, step, tokens)?;
            add(x, mixed, &block.attention[Target::O as usize])?;
            let norm = (&block.feed_forward_norm, epsilon);
            steps.swiglu(inner, x, norm, &block.gate.weight, &block.up.weight)?;
            add(x, inner, &block.down)?;
        }
        let weight = weights.lm_head.as_ref().unwrap_or(&weights.embedding);
        let output = StepLinear { out: logits, weight, bias: None };
        Ok(steps.linears(&mut [output], x, Some((&weights.final_norm, epsilon)), false)?)
    }
}
