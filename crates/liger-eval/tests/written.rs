//! Whole texts, written answers, examples before the question, recall, the cache and greedy agreement, on tiny random models.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::sync::Arc;

use liger_cpu::Cpu;
use liger_eval::{
    Answer, Cache, DEPTHS, Item, Probe, Request, Subject, Surroundings, Task, evaluate, greedy_agreement,
    loglikelihood, recall,
};
use liger_model::{Decoder, LigerConfig, ModelConfig, RandomWeights, Structure, Tokenizer, Weights};
use liger_tensor::{DType, Ops, Sequences};

fn decoder(seed: u64) -> Decoder {
    let ops: Arc<dyn Ops> = Arc::new(Cpu::new());
    let config = ModelConfig::shape("tiny").unwrap();
    let weights = Weights::load(&RandomWeights::new(&config, seed), &config, &*ops, DType::F32).unwrap();
    Decoder::new(ops, config, weights).with_attention(Some(LigerConfig::paper(Structure::Gsa)))
}

fn subject(decoder: &Decoder) -> Subject<'_> {
    Subject { name: "tiny".into(), decoder, adapter: None }
}

/// The most likely token after `ids`, by a pass of its own.
fn most_likely(decoder: &Decoder, ids: &[u32]) -> u32 {
    let hidden = decoder.forward(ids, &Sequences::fresh([ids.len()]), None, None).unwrap();
    let logits = decoder.ops().download(&decoder.logits(&hidden).unwrap()).unwrap();
    let last = &logits[logits.len() - decoder.config().vocab_size..];
    (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32
}

#[test]
fn every_token_of_a_long_text_is_predicted_once() {
    let ids: Vec<u32> = (10..20).collect();
    let request = |context: &[u32], continuation: &[u32]| Request {
        context: context.to_vec(),
        continuation: continuation.to_vec(),
    };
    assert_eq!(
        Request::rolling(&ids, 0, 4),
        [request(&[0], &[10, 11, 12, 13]), request(&[13], &[14, 15, 16, 17]), request(&[15, 16, 17], &[18, 19])]
    );
    assert_eq!(Request::rolling(&ids, 0, 10), [request(&[0], &ids)]);
    assert!(Request::rolling(&[], 0, 4).is_empty());
}

#[test]
fn perplexities_of_whole_texts_count_words_and_bytes() {
    let decoder = decoder(0);
    let task = "kind = \"text\"\ndata = \"x\"\ntext = \"{{ page }}\"\n\
                metrics = [\"word_perplexity\", \"byte_perplexity\", \"bits_per_byte\"]\n";
    let task = Task::parse(task, Path::new("pages.toml")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.jsonl"), "{\"page\": \"one two three\"}\n{\"page\": \"four\"}\n").unwrap();
    let items = task.items(folder.path(), usize::MAX).unwrap();
    let bytes = Tokenizer::bytes();
    let around = Surroundings { tokenizer: &bytes, first: 0, last: &[] };
    let result = evaluate(&subject(&decoder), &around, &task, &items, None, &mut |_| {}).unwrap();
    let log: f64 = ["one two three", "four"]
        .iter()
        .map(|text| {
            let request = Request { context: vec![0], continuation: text.bytes().map(u32::from).collect() };
            loglikelihood(&subject(&decoder), &[request], None, &mut |_| {}).unwrap()[0].log
        })
        .sum();
    let expected = [(-log / 4.0).exp(), (-log / 17.0).exp(), -log / 17.0 / std::f64::consts::LN_2];
    for (score, expected) in result.scores.iter().zip(expected) {
        assert!((score.value / expected - 1.0).abs() < 1e-6, "{}: {} {expected}", score.metric, score.value);
    }
}

#[test]
fn written_answers_end_where_the_task_says_and_are_compared() {
    let decoder = decoder(0);
    let bytes = Tokenizer::bytes();
    let prompts = ["Q: a", "Q: bb", "Q: a"];
    // What the model writes, token by token.
    let written: Vec<String> = prompts
        .iter()
        .map(|prompt| {
            let mut ids: Vec<u32> = prompt.bytes().map(u32::from).collect();
            for _ in 0..6 {
                ids.push(most_likely(&decoder, &ids));
            }
            bytes.decode(&ids[prompt.len()..], true).unwrap()
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let answers = [written[0].trim(), "something else", written[2].trim()];
    let records: String = prompts
        .iter()
        .zip(answers)
        .map(|(prompt, answer)| serde_json::json!({"question": prompt, "answer": answer}).to_string() + "\n")
        .collect();
    std::fs::write(folder.path().join("x.jsonl"), records).unwrap();
    let task = "kind = \"answer\"\ndata = \"x\"\ncontext = \"{{ question }}\"\nanswer = \"{{ answer }}\"\n\
                max_tokens = 6\nmetrics = [\"exact_match\"]\n";
    let parsed = Task::parse(task, Path::new("mine.toml")).unwrap();
    let items = parsed.items(folder.path(), usize::MAX).unwrap();
    let around = Surroundings { tokenizer: &bytes, first: 0, last: &[] };
    let result = evaluate(&subject(&decoder), &around, &parsed, &items, None, &mut |_| {}).unwrap();
    assert_eq!(result.answers[1], Answer::Text(written[1].trim().to_owned()));
    assert!((result.scores[0].value - 2.0 / 3.0).abs() < 1e-12, "{:?}", result.scores);

    // The first character that the model writes ends the text.
    let end = written[0].chars().next().unwrap();
    let until = format!("{task}until = [{}]\n", serde_json::json!(end.to_string()));
    let parsed = Task::parse(&until, Path::new("mine.toml")).unwrap();
    let result = evaluate(&subject(&decoder), &around, &parsed, &items, None, &mut |_| {}).unwrap();
    assert_eq!(result.answers[0], Answer::Text(String::new()));
    // An extraction takes a part of what was written.
    let extract = format!("{task}extract = '(?s)^(.)'\n");
    let parsed = Task::parse(&extract, Path::new("mine.toml")).unwrap();
    let result = evaluate(&subject(&decoder), &around, &parsed, &items, None, &mut |_| {}).unwrap();
    assert_eq!(result.answers[0], Answer::Text(end.to_string().trim().to_owned()));
}

#[test]
fn examples_are_of_the_questions_subject_and_in_the_files_order() {
    let record = |subject: &str, question: &str, answer: usize| {
        let choices = ["w", "x", "y", "z"];
        serde_json::json!({"question": question, "subject": subject, "choices": choices, "answer": answer}).to_string()
    };
    let folder = tempfile::tempdir().unwrap();
    let dev: Vec<String> = (0..12).map(|i| record(["a_b", "c"][i % 2], &format!("dev {i}"), i % 4)).collect();
    std::fs::write(folder.path().join("mmlu_dev.jsonl"), dev.join("\n")).unwrap();
    std::fs::write(folder.path().join("mmlu_test.jsonl"), record("a_b", "asked ", 2)).unwrap();
    let items = Task::open("mmlu").unwrap().items(folder.path(), usize::MAX).unwrap();
    let Item::Choices { pairs, gold, .. } = &items[0] else { panic!("{:?}", items[0]) };
    let question = |text: &str, answer: &str| format!("{text}\nA. w\nB. x\nC. y\nD. z\nAnswer:{answer}");
    let start = "The following are multiple choice questions (with answers) about a b.\n\n";
    let shots: Vec<String> =
        [(0, " A"), (2, " C"), (4, " A"), (6, " C"), (8, " A")].map(|(i, a)| question(&format!("dev {i}"), a)).into();
    assert_eq!(pairs[2], (format!("{start}{}\n\n{}", shots.join("\n\n"), question("asked", "")), " C".into()));
    assert_eq!((pairs.len(), *gold), (4, 2));
}

#[test]
fn questions_fit_their_length_and_hold_their_answer_at_their_depth() {
    let bytes = Tokenizer::bytes();
    for probe in Probe::ALL {
        for length in [700, 3000] {
            let mut places = Vec::new();
            for depth in DEPTHS {
                let question = probe.question(&bytes, length, depth, 7).unwrap();
                assert_eq!(question, probe.question(&bytes, length, depth, 7).unwrap());
                assert_ne!(question, probe.question(&bytes, length, depth, 8).unwrap());
                assert!((length - 150..=length).contains(&question.tokens()), "{probe:?} {}", question.tokens());
                let text = bytes.decode(&question.context, true).unwrap();
                let answer = bytes.decode(&question.continuation, true).unwrap();
                places.push(text.find(answer.trim()).unwrap_or_else(|| panic!("{probe:?}: no {answer} in {text}")));
            }
            assert!(places.windows(2).all(|pair| pair[0] < pair[1]), "{probe:?} {places:?}");
        }
    }
    let decoder = decoder(0);
    let scores = recall(&subject(&decoder), &bytes, Probe::Passkey, &[700, 900], (2, 0), None, &mut |_| {}).unwrap();
    assert_eq!(scores.cells.len(), 2 * DEPTHS.len());
    assert!(scores.cells.iter().all(|cell| cell.items == 2 && cell.right <= 2));
}

#[test]
fn what_was_answered_is_not_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let requests: Vec<Request> =
        (1..5).map(|i| Request { context: vec![i, i + 1], continuation: vec![i + 2] }).collect();
    let (first, other) = (decoder(0), decoder(1));
    let mut cache = Cache::open(folder.path(), "a model").unwrap();
    let scores = loglikelihood(&subject(&first), &requests[..3], Some(&mut cache), &mut |_| {}).unwrap();
    drop(cache);
    // The machine went down in the middle of a line.
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let mut text = std::fs::read_to_string(&file).unwrap();
    text.push_str("{\"key\": \"12");
    std::fs::write(&file, &text).unwrap();
    // Another model's answers would differ: the first three are taken from the file.
    let mut cache = Cache::open(folder.path(), "a model").unwrap();
    let again = loglikelihood(&subject(&other), &requests, Some(&mut cache), &mut |_| {}).unwrap();
    assert_eq!(again[..3], scores);
    let own = loglikelihood(&subject(&other), &requests, None, &mut |_| {}).unwrap();
    assert!((again[3].log - own[3].log).abs() < 1e-5 && (again[0].log - own[0].log).abs() > 1e-5);
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 4);
    let mut elsewhere = Cache::open(folder.path(), "another model").unwrap();
    let fresh = loglikelihood(&subject(&other), &requests, Some(&mut elsewhere), &mut |_| {}).unwrap();
    assert!((fresh[0].log - own[0].log).abs() < 1e-5);
}

#[test]
fn requests_that_differ_in_the_last_token_share_a_pass() {
    let decoder = decoder(0);
    let request = |context: &[u32], continuation: &[u32]| Request {
        context: context.to_vec(),
        continuation: continuation.to_vec(),
    };
    // The same five tokens are read for the first three; the last has nothing to predict.
    let requests = [
        request(&[1, 2, 3, 4, 5], &[6]),
        request(&[1, 2, 3, 4, 5], &[7]),
        request(&[1, 2, 3], &[4, 5, 8]),
        request(&[9, 9], &[1, 1]),
        request(&[3], &[]),
    ];
    let together = loglikelihood(&subject(&decoder), &requests, None, &mut |_| {}).unwrap();
    for (request, score) in requests.iter().zip(&together).take(4) {
        let alone = loglikelihood(&subject(&decoder), std::slice::from_ref(request), None, &mut |_| {}).unwrap()[0];
        assert!((alone.log - score.log).abs() < 1e-4, "{request:?}: {} {}", alone.log, score.log);
        assert_eq!(alone.greedy, score.greedy);
    }
    assert_eq!((together[4].log, together[4].cut), (0.0, false));
}

#[test]
fn a_model_agrees_with_itself() {
    let (own, other) = (decoder(0), decoder(1));
    let texts: Vec<Vec<u32>> = (0..3).map(|t| (0..40).map(|i| (i * 7 + t) % 250).collect()).collect();
    let found = greedy_agreement(&subject(&own), &[subject(&own), subject(&other)], &texts, 32).unwrap();
    assert_eq!((found[0].texts, found[0].prompt), (3, 32));
    assert!((found[0].until_first_difference - found[0].written as f64).abs() < 1e-12);
    assert!(found[0].same.iter().all(|&share| share == 1.0));
    assert!(found[1].until_first_difference < found[0].until_first_difference);
    assert!(greedy_agreement(&subject(&own), &[subject(&own)], &texts, 64).unwrap()[0].texts == 0);
}

#[test]
fn what_does_not_fit_loses_its_beginning_and_is_counted() {
    // The harness: the last `limit + 1` tokens of context and continuation, of which the last is only predicted.
    let base = decoder(0).with_attention(None);
    let limit = base.context_limit().unwrap();
    let long: Vec<u32> = (0..limit as u32 + 40).map(|i| i * 7 % 250).collect();
    let request = |context: &[u32]| Request { context: context.to_vec(), continuation: vec![3, 5] };
    let fits = &long[long.len() + 1 - limit..];
    let scores = loglikelihood(&subject(&base), &[request(&long), request(fits)], None, &mut |_| {}).unwrap();
    assert_eq!((scores[0].cut, scores[1].cut), (true, false));
    assert!((scores[0].log - scores[1].log).abs() < 1e-4, "{} {}", scores[0].log, scores[1].log);

    let folder = tempfile::tempdir().unwrap();
    let records = [limit + 9, 5].map(|n| serde_json::json!({"q": "a".repeat(n), "a": "b"}).to_string() + "\n");
    std::fs::write(folder.path().join("x.jsonl"), records.concat()).unwrap();
    let task = "kind = \"answer\"\ndata = \"x\"\ncontext = \"{{ q }}\"\nanswer = \"{{ a }}\"\nmax_tokens = 4\n\
                metrics = [\"exact_match\"]\n";
    let task = Task::parse(task, Path::new("long.toml")).unwrap();
    let items = task.items(folder.path(), usize::MAX).unwrap();
    let bytes = Tokenizer::bytes();
    let around = Surroundings { tokenizer: &bytes, first: 0, last: &[] };
    assert_eq!(evaluate(&subject(&base), &around, &task, &items, None, &mut |_| {}).unwrap().cut, 1);
}
