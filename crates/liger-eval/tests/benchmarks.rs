//! Tasks from records to figures, on a tiny random model.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::sync::Arc;

use liger_cpu::Cpu;
use liger_eval::{Item, Request, Subject, Surroundings, Task, evaluate, loglikelihood};
use liger_model::{Decoder, LigerConfig, ModelConfig, RandomWeights, Structure, Tokenizer, Weights};
use liger_tensor::{DType, Ops, Sequences};

fn decoder() -> Decoder {
    let ops: Arc<dyn Ops> = Arc::new(Cpu::new());
    let config = ModelConfig::shape("tiny").unwrap();
    let weights = Weights::load(&RandomWeights::new(&config, 0), &config, &*ops, DType::F32).unwrap();
    Decoder::new(ops, config, weights)
}

/// log softmax of the logits after each of `ids`, in float64.
fn log_probabilities(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f64>> {
    let hidden = decoder.forward(ids, &Sequences::fresh([ids.len()]), None, None).unwrap();
    let logits = decoder.ops().download(&decoder.logits(&hidden).unwrap()).unwrap();
    let row = |row: &[f32]| {
        let top = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        row.iter().map(|x| f64::from(x - top) - sum.ln()).collect()
    };
    logits.chunks(decoder.config().vocab_size).map(row).collect()
}

#[test]
fn likelihoods_are_sums_over_the_continuation() {
    let base = decoder();
    for decoder in [base.with_attention(None), base.with_attention(Some(LigerConfig::paper(Structure::Gla)))] {
        let subject = Subject { name: "tiny".into(), decoder: &decoder, adapter: None };
        let request = |context: &[u32], continuation: &[u32]| Request {
            context: context.to_vec(),
            continuation: continuation.to_vec(),
        };
        let long: Vec<u32> = (0..150).map(|i| i * 37 % 250).collect();
        let requests = [request(&[1, 2, 3], &[4]), request(&long, &[9, 8, 7]), request(&[5], &[6, 7])];
        let scores = loglikelihood(&subject, &requests, None, &mut |_| {}).unwrap();
        for (request, score) in requests.iter().zip(scores) {
            let ids = [&request.context[..], &request.continuation[..]].concat();
            let table = log_probabilities(&decoder, &ids[..ids.len() - 1]);
            let rows = request.context.len() - 1..ids.len() - 1;
            let expected: f64 = rows.clone().map(|row| table[row][ids[row + 1] as usize]).sum();
            let greedy = rows.clone().all(|row| {
                let best = table[row].iter().copied().fold(f64::MIN, f64::max);
                table[row][ids[row + 1] as usize] == best
            });
            assert!((score.log - expected).abs() < 1e-3, "{} {expected}", score.log);
            assert_eq!((score.greedy, score.cut), (greedy, false));
        }
    }
}

#[test]
fn a_greedy_continuation_is_told() {
    let decoder = decoder().with_attention(None);
    let subject = Subject { name: "tiny".into(), decoder: &decoder, adapter: None };
    let table = log_probabilities(&decoder, &[3, 1, 4]);
    let best = (0..table[2].len()).max_by(|&a, &b| table[2][a].total_cmp(&table[2][b])).unwrap() as u32;
    let request = |token: u32| Request { context: vec![3, 1, 4], continuation: vec![token] };
    let scores = loglikelihood(&subject, &[request(best), request((best + 1) % 200)], None, &mut |_| {}).unwrap();
    assert_eq!(scores.iter().map(|score| score.greedy).collect::<Vec<_>>(), [true, false]);
}

fn items(task: &str, records: &str) -> Vec<liger_eval::Item> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(format!("{task}.jsonl")), records).unwrap();
    Task::open(task).unwrap().items(folder.path(), usize::MAX).unwrap()
}

fn gold(item: &Item) -> usize {
    if let Item::Choices { gold, .. } = item { *gold } else { panic!("{item:?}") }
}

fn texts(item: &liger_eval::Item) -> Vec<(&str, &str)> {
    let Item::Choices { pairs, .. } = item else { panic!("{item:?}") };
    pairs.iter().map(|(context, continuation)| (context.as_str(), continuation.as_str())).collect()
}

#[test]
fn prompts_are_those_of_the_harness() {
    let record = r#"{"question": "Which?", "choices": {"text": ["a b", "c"], "label": ["1", "2"]}, "answerKey": "2"}"#;
    let arc = &items("arc_easy", record)[0];
    assert_eq!(texts(arc), [("Question: Which?\nAnswer:", " a b"), ("Question: Which?\nAnswer:", " c")]);
    let Item::Choices { lengths, gold: right, .. } = arc else { panic!("{arc:?}") };
    assert_eq!((*right, &lengths[..]), (1, &[3, 1][..]));

    let record = r#"{"sentence": "Ann beat Bo since _ was fit. ", "option1": "Ann", "option2": "Bo", "answer": "1"}"#;
    let winogrande = &items("winogrande", record)[0];
    let ending = " was fit.";
    assert_eq!(texts(winogrande), [("Ann beat Bo since Ann", ending), ("Ann beat Bo since Bo", ending)]);
    assert_eq!(gold(winogrande), 0);

    let record = r#"{"activity_label": "Baking", "ctx_a": "[header] A cake [title] Mix.", "ctx_b": "the COOK",
        "endings": ["eats. [step] Now", "sleeps"], "label": "1"}"#
        .replace('\n', " ");
    let hellaswag = &items("hellaswag", &record)[0];
    let context = "Baking: A cake. Mix. The cook";
    assert_eq!(texts(hellaswag), [(context, " eats. Now"), (context, " sleeps")]);

    let lambada = &items("lambada_openai", r#"{"text": "one two\n three"}"#)[0];
    assert_eq!(texts(lambada), [("one two\n", " three")]);
}

#[test]
fn every_task_of_the_program_can_be_read() {
    for name in Task::names() {
        assert_eq!(Task::open(name).unwrap().name, name);
    }
}

#[test]
fn accuracies_are_of_the_likelihoods() {
    let decoder = decoder().with_attention(None);
    let subject = Subject { name: "tiny".into(), decoder: &decoder, adapter: None };
    let records: String = (0..7)
        .map(|i| format!("{{\"goal\": \"g{i}\", \"sol1\": \"x{i}\", \"sol2\": \"yy{i}\", \"label\": {}}}\n", i % 2))
        .collect();
    let items = items("piqa", &records);
    let task = Task::open("piqa").unwrap();
    let bytes = Tokenizer::bytes();
    let around = Surroundings { tokenizer: &bytes, first: 0, last: &[] };
    let result = evaluate(&subject, &around, &task, &items, None, &mut |_| {}).unwrap();
    assert_eq!((result.items, result.cut), (7, 0));
    let tokens = |text: &str| Tokenizer::bytes().encode(text, false).unwrap();
    let right = items.iter().filter(|item| {
        let sums: Vec<f64> = texts(item)
            .into_iter()
            .map(|(context, continuation)| {
                let ids = [tokens(context), tokens(continuation)].concat();
                let table = log_probabilities(&decoder, &ids[..ids.len() - 1]);
                (tokens(context).len() - 1..ids.len() - 1).map(|row| table[row][ids[row + 1] as usize]).sum()
            })
            .collect();
        usize::from(sums[1] > sums[0]) == gold(item)
    });
    let mean = right.count() as f64 / 7.0;
    let acc = &result.scores[0];
    assert_eq!((acc.metric.as_str(), acc.value), ("acc", mean));
    assert!((acc.standard_error.unwrap() - (mean * (1.0 - mean) / 6.0).sqrt()).abs() < 1e-12);
}

#[test]
fn mistakes_name_file_line_and_field() {
    let parse = |text: &str| Task::parse(text, Path::new("mine.toml")).unwrap_err().to_string();
    let whole = "data = \"x\"\ncontext = \"\"\nchoices = \"[a]\"\ngold = \"0\"\nmetrics = [\"acc\"]\n";
    assert!(parse(&whole.replace("gold", "gould")).starts_with("mine.toml: line 4: unknown field `gould`"));
    assert!(parse(&whole.replace("acc", "accuracy")).starts_with("mine.toml: line 5: unknown variant `accuracy`"));
    let unknown = Task::open("arc_eazy").unwrap_err().to_string();
    assert!(unknown.contains("did you mean `arc_easy`?"), "{unknown}");
    let folder = tempfile::tempdir().unwrap();
    let missing = Task::open("piqa").unwrap().items(folder.path(), 1).unwrap_err().to_string();
    assert!(missing.contains("no piqa.jsonl or piqa.jsonl.zst here"), "{missing}");
    std::fs::write(folder.path().join("piqa.jsonl"), "{\"goal\": \"g\", \"sol1\": \"a\", \"label\": 0}\n").unwrap();
    let lacking = Task::open("piqa").unwrap().items(folder.path(), 1).unwrap_err().to_string();
    assert!(lacking.contains("line 1") && lacking.contains("piqa.toml"), "{lacking}");
    std::fs::write(folder.path().join("piqa.jsonl"), "[1\n").unwrap();
    assert!(Task::open("piqa").unwrap().items(folder.path(), 1).unwrap_err().to_string().contains("line 1: not JSON"));
}
