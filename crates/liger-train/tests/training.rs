//! Whole runs on a tiny model: the loss falls, a run that was cut off goes on as if it had not been.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use liger_cpu::Cpu;
use liger_model::{Decoder, ModelConfig, RandomWeights, Recompute, Weights};
use liger_tensor::DType;
use liger_train::data::Document;
use liger_train::{Error, Event, Finished, LossOn, Objective, Outcome, Recipe, StepRecord, Trainer};

fn student(recipe: &Recipe) -> Decoder {
    let config = ModelConfig::shape("tiny").unwrap();
    let ops = Arc::new(Cpu::new());
    let weights = Weights::load(&RandomWeights::new(&config, 5), &config, &*ops, DType::F32).unwrap();
    Decoder::new(ops, config, weights).with_attention(Some(recipe.liger_config(&ModelConfig::shape("tiny").unwrap())))
}

fn recipe(objective: Objective) -> Recipe {
    let mut recipe = Recipe::load("default").unwrap();
    recipe.liger.window = 16;
    recipe.set_structure("gla");
    recipe.lora.rank = 4;
    recipe.lora.dropout = 0.1;
    recipe.data.length = 48;
    recipe.train.objective = objective;
    recipe.train.batch = 2;
    recipe.train.learning_rate = 1e-2;
    recipe.train.warmup_steps = 2;
    recipe.train.tokens = 2 * 48 * 12;
    recipe.train.checkpoint_every = 3;
    recipe.train.validate_every = 4;
    recipe
}

/// Texts that count upwards in steps of their own.
fn documents(count: usize) -> Vec<Document> {
    (0..count)
        .map(|n| Document {
            line: n + 1,
            ids: (0..30 + n as u32 % 20).map(|i| (n as u32 + 3 * i) % 256).collect(),
            answer: (0..30 + n % 20).map(|i| i > 5).collect(),
            begin: None,
        })
        .collect()
}

fn train(recipe: &Recipe, run: &Path, resume: bool, stop_after: Option<u64>) -> (Vec<StepRecord>, Outcome) {
    let validation = documents(3);
    let mut trainer =
        Trainer::new(student(recipe), recipe.clone(), documents(20), &validation, run, resume, Recompute::Layer)
            .unwrap();
    let stop = AtomicBool::new(false);
    let mut records = Vec::new();
    let outcome = trainer
        .run(&stop, &mut |event| {
            if let Event::Step(record) = event {
                records.push(record.clone());
                stop.store(stop_after == Some(record.step), Ordering::Relaxed);
            }
        })
        .unwrap();
    (records, outcome)
}

#[test]
fn the_loss_falls_for_both_objectives() {
    for objective in [Objective::NextToken, Objective::Distillation] {
        let folder = tempfile::tempdir().unwrap();
        let mut recipe = recipe(objective);
        recipe.train.tokens *= 3;
        recipe.lora.dropout = 0.0;
        let (records, outcome) = train(&recipe, folder.path(), false, None);
        assert_eq!((outcome.finished, outcome.step), (Finished::Done, 36));
        let validation: Vec<f64> = records.iter().filter_map(|r| r.validation_loss).collect();
        assert!(validation.last().unwrap() < &(0.97 * validation[0]), "{objective:?}: {validation:?}");
        assert!(folder.path().join("adapter/adapter_model.safetensors").exists());
        let lines = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 36);
    }
}

#[test]
fn a_resumed_run_has_the_very_losses_of_an_unbroken_one() {
    let recipe = recipe(Objective::Distillation);
    let whole = tempfile::tempdir().unwrap();
    let (expected, _) = train(&recipe, whole.path(), false, None);
    let cut = tempfile::tempdir().unwrap();
    let (mut found, outcome) = train(&recipe, cut.path(), false, Some(5));
    assert_eq!((outcome.finished, outcome.step), (Finished::Interrupted, 5));
    found.extend(train(&recipe, cut.path(), true, None).0);
    let numbers = |records: &[StepRecord]| -> Vec<_> {
        records.iter().map(|r| (r.step, r.loss.to_bits(), r.gradient_norm.to_bits(), r.validation_loss)).collect()
    };
    assert_eq!(numbers(&found), numbers(&expected));
    let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(cut.path()), adapter(whole.path()));
}

#[test]
fn micro_batches_give_the_same_step() {
    let mut recipe = recipe(Objective::NextToken);
    recipe.data.loss_on = LossOn::Answers;
    recipe.data.reset_at_documents = true;
    recipe.lora.dropout = 0.0;
    recipe.train.micro_batch = 2;
    let folder = tempfile::tempdir().unwrap();
    let (together, _) = train(&recipe, folder.path(), false, Some(2));
    recipe.train.micro_batch = 1;
    let folder = tempfile::tempdir().unwrap();
    let (apart, _) = train(&recipe, folder.path(), false, Some(2));
    for (a, b) in together.iter().zip(&apart) {
        assert!(
            (a.loss - b.loss).abs() < 1e-5 && (a.gradient_norm / b.gradient_norm - 1.0).abs() < 1e-3,
            "{a:?} {b:?}"
        );
    }
}

#[test]
fn other_settings_or_data_are_refused_on_resume() {
    let recipe = recipe(Objective::NextToken);
    let folder = tempfile::tempdir().unwrap();
    train(&recipe, folder.path(), false, Some(3));
    let mut other = recipe.clone();
    other.train.learning_rate = 1e-3;
    let new = |recipe: &Recipe, count| {
        Trainer::new(student(recipe), recipe.clone(), documents(count), &[], folder.path(), true, Recompute::Layer)
            .err()
            .unwrap()
            .to_string()
    };
    assert!(new(&other, 20).ends_with("of a run with other settings; start anew with --force"));
    assert!(new(&recipe, 19).ends_with("of a run with other data; start anew with --force"));
}

#[test]
fn a_loss_that_is_no_number_names_step_data_and_checkpoint() {
    let mut recipe = recipe(Objective::NextToken);
    recipe.train.learning_rate = 1e30;
    recipe.train.warmup_steps = 0;
    recipe.train.clip = 0.0;
    recipe.train.checkpoint_every = 1;
    let folder = tempfile::tempdir().unwrap();
    let mut trainer =
        Trainer::new(student(&recipe), recipe.clone(), documents(20), &[], folder.path(), false, Recompute::Layer)
            .unwrap();
    let error = trainer.run(&AtomicBool::new(false), &mut |_| {}).unwrap_err();
    let Error::NotFinite { step, data, checkpoint, .. } = &error else { panic!("{error}") };
    assert!(*step > 1 && data.starts_with("documents ") && checkpoint.contains("checkpoints/step-"), "{error}");
}
