//! A real server on a loopback port with a tiny random model, spoken to over plain sockets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::Read;
use std::time::{Duration, Instant};

use liger_model::{GenerateOptions, Generator, Sampling, TextStream, Tokenizer};
use liger_serve::Limits;
use serde_json::{Value, json};
use support::{Server, decoder};

/// What the model writes alone, greedily.
fn alone(prompt: &str, max_tokens: usize) -> String {
    let (decoder, tokenizer) = (decoder(), Tokenizer::bytes());
    let generator = Generator { decoder: &decoder, adapter: None };
    let options = GenerateOptions {
        max_tokens,
        sampling: Sampling::default(),
        seed: 0,
        stop_ids: decoder.config().eos_token_ids.clone(),
    };
    let ids = tokenizer.encode(prompt, true).unwrap();
    let mut state = decoder.new_state(1).unwrap();
    let (mut stream, mut text) = (TextStream::new(&tokenizer, &ids), String::new());
    let mut take = |id| {
        text.push_str(&stream.push(id)?);
        Ok(true)
    };
    generator.generate(&mut state, &ids, &options, &mut take).unwrap();
    text
}

#[test]
fn texts_side_by_side_are_those_written_alone() {
    let server = Server::start(Limits { slots: 3, ..Limits::default() });
    // More requests than slots, prompts of several chunks among them.
    let prompts: Vec<String> = (0..8).map(|i| format!("text {i} ").repeat(1 + 40 * (i % 3))).collect();
    let answers: Vec<(u16, Value)> = std::thread::scope(|scope| {
        let ask = |prompt: &String| {
            let request = json!({"prompt": prompt, "max_tokens": 24, "temperature": 0});
            let server = &server;
            scope.spawn(move || server.complete(&request))
        };
        let threads: Vec<_> = prompts.iter().map(ask).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (prompt, (status, answer)) in prompts.iter().zip(answers) {
        assert_eq!((status, &answer["model"]), (200, &json!("tiny")), "{answer}");
        assert_eq!(answer["choices"][0]["text"], json!(alone(prompt, 24)));
        assert_eq!(answer["usage"]["prompt_tokens"], json!(prompt.len()));
    }
}

/// What lm-evaluation-harness asks: the log-probabilities of the prompt's own tokens, of several prompts at once.
#[test]
fn echoed_prompts_have_the_models_log_probabilities() {
    let (server, decoder) = (Server::start(Limits { slots: 2, ..Limits::default() }), decoder());
    // The first is read in several chunks.
    let prompts: Vec<Vec<u32>> = vec![(0..600).map(|i| 32 + i * 7 % 90).collect(), vec![65], vec![72, 105, 33]];
    let request = json!({"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": true});
    let (status, answer) = server.complete(&request);
    assert_eq!((status, answer["choices"].as_array().unwrap().len()), (200, 3), "{answer}");
    assert_eq!(answer["usage"]["prompt_tokens"], json!(604));
    for (index, prompt) in prompts.iter().enumerate() {
        let choice = &answer["choices"][index];
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        assert_eq!((&choice["index"], logprobs.len()), (&json!(index), prompt.len() + 1), "{choice}");
        assert!(logprobs[0].is_null() && choice["logprobs"]["top_logprobs"][0].is_null());
        let hidden = decoder.forward(prompt, &liger_tensor::Sequences::fresh([prompt.len()]), None, None).unwrap();
        let logits = decoder.ops().download(&decoder.logits(&hidden).unwrap()).unwrap();
        let rows: Vec<&[f32]> = logits.chunks_exact(decoder.config().vocab_size).collect();
        for (t, row) in rows.iter().enumerate() {
            let all = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = prompt.get(t + 1).map_or(largest, |&id| row[id as usize]);
            let found = logprobs[t + 1].as_f64().unwrap();
            assert!((found - (f64::from(expected) - all)).abs() < 1e-4, "{index}, {t}: {found}");
            let top = choice["logprobs"]["top_logprobs"][t + 1].as_object().unwrap();
            let best = top.values().map(|x| x.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
            assert!((best - (f64::from(largest) - all)).abs() < 1e-4, "{index}, {t}: {top:?}");
        }
    }
    assert!(answer["choices"][2]["text"].as_str().unwrap().starts_with("Hi!"), "{answer}");
    let (status, answer) = server.complete(&json!({"prompt": "Hi!", "max_tokens": 0, "logprobs": 0, "echo": true}));
    assert_eq!((status, &answer["choices"][0]["text"]), (200, &json!("Hi!")), "{answer}");
    assert_eq!(answer["choices"][0]["logprobs"]["text_offset"], json!([0, 1, 2]));
}

#[test]
fn streams_stops_and_seeds() {
    let server = Server::start(Limits::default());
    let text = alone("begin", 20);
    let request = json!({"prompt": "begin", "max_tokens": 20, "temperature": 0, "stream": true});
    let (status, head, body) = server.ask("POST", "/v1/completions", "", &request.to_string());
    assert!(status == 200 && head.contains("content-type: text/event-stream"), "{head}");
    let data: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> = data[..data.len() - 1].iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let streamed: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(streamed, text);
    assert!(chunks[chunks.len() - 1]["usage"]["completion_tokens"].as_u64().unwrap() <= 20);

    // Several prompts and several answers to each, all at once; log-probabilities with the pieces.
    let request =
        json!({"prompt": ["begin", "other"], "n": 2, "max_tokens": 5, "temperature": 0, "stream": true, "logprobs": 1});
    let (_, _, body) = server.ask("POST", "/v1/completions", "", &request.to_string());
    let chunks = body.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    let (mut texts, mut scores, mut usages) = (vec![String::new(); 4], vec![0; 4], 0);
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index].push_str(choice["text"].as_str().unwrap());
        scores[index] += choice["logprobs"]["tokens"].as_array().map_or(0, Vec::len);
        usages += usize::from(!chunk["usage"].is_null());
    }
    assert_eq!(texts, [alone("begin", 5), alone("begin", 5), alone("other", 5), alone("other", 5)]);
    assert_eq!((scores, usages), (vec![5; 4], 1));

    // A stop string in the middle ends the text before it.
    let stop: String = text.chars().skip(3).take(2).collect();
    let (_, answer) = server.complete(&json!({"prompt": "begin", "max_tokens": 20, "temperature": 0, "stop": stop}));
    assert_eq!(answer["choices"][0]["text"], json!(text[..text.find(&stop).unwrap()]));
    assert_eq!(answer["choices"][0]["finish_reason"], json!("stop"));

    let drawn = |seed: u64| {
        let request = json!({"prompt": "begin", "max_tokens": 20, "temperature": 1.5, "seed": seed});
        server.complete(&request).1["choices"][0]["text"].clone()
    };
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

#[test]
fn mistakes_are_said_in_openais_form() {
    let server = Server::start(Limits { body: 2000, ..Limits::default() });
    let refused = |path: &str, body: &str, status: u16, expected: &str| {
        let (found, _, text) = server.ask("POST", path, "", body);
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}"));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(found == status && message.contains(expected), "{found} {message}");
        assert_eq!(answer["error"]["type"], json!("invalid_request_error"));
    };
    refused("/v1/completions", "{", 400, "the request is not what it must be: EOF");
    refused("/v1/completions", "{\"prompt\": \"\u{e9}\", \"max_tokens\": -1}", 400, "invalid value");
    refused("/v1/completions", "{\"prompt\": \"\"}", 400, "the prompt is empty");
    refused("/v1/completions", "{\"prompt\": 5}", 400, "`prompt`: expected a text, a list of tokens");
    refused("/v1/completions", "{\"prompt\": \"a\", \"stop\": 5}", 400, "`stop`: expected a text or a list of texts");
    refused("/v1/completions", "{\"prompt\": [300]}", 400, "300");
    refused("/v1/completions", "{\"prompt\": \"a\", \"n\": 0}", 400, "`n`: expected a number from 1 to 128");
    refused("/v1/completions", "{\"prompt\": \"a\", \"n\": 2, \"best_of\": 3}", 400, "`best_of` is not supported");
    refused("/v1/completions", "{\"prompt\": \"a\", \"keep_state\": true}", 400, "keeps no states");
    refused("/tokenize", "{}", 400, "either `prompt` or `messages`");
    refused(
        "/v1/completions",
        "{\"prompt\": \"a\", \"logprobs\": 21}",
        400,
        "`logprobs`: found 21, expected a whole number",
    );
    refused(
        "/v1/completions",
        "{\"prompt\": \"a\", \"echo\": true, \"stream\": true}",
        400,
        "`echo` does not go with `stream`",
    );
    refused("/v1/completions", "{\"prompt\": [[1], []]}", 400, "the prompt is empty");
    refused("/v1/completions", "{\"prompt\": \"a\", \"max_tokens\": 0}", 400, "`max_tokens`: found 0");
    refused("/v1/chat/completions", "{\"messages\": [], \"logprobs\": true}", 400, "no chat template");
    refused("/v1/completions", "{\"prompt\": \"a\", \"temperature\": -1}", 400, "`temperature`: found -1");
    refused("/v1/completions", "{\"prompt\": \"a\", \"model\": \"gpt\"}", 404, "`tiny` is");
    refused("/v1/completions", &"x".repeat(3000), 413, "longer than 2000 bytes");
    refused(
        "/v1/chat/completions",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
        400,
        "no chat template",
    );
    refused("/v2", "{}", 404, "no such path");
    assert_eq!(server.ask("GET", "/v1/completions", "", "").0, 405);
    assert_eq!(server.ask("GET", "/health", "", "").2, "{\"status\":\"ok\"}");
    // And it still works.
    assert_eq!(server.complete(&json!({"prompt": "a", "max_tokens": 2})).0, 200);
}

#[test]
fn a_text_at_the_end_of_its_context_is_over_and_holds_up_nobody() {
    let base = decoder().with_attention(None);
    let limit = base.context_limit().unwrap();
    let server = Server::with_model(base, Limits::default());
    let prompt = "a".repeat(limit - 5);
    std::thread::scope(|scope| {
        let ask = |prompt: String, tokens: usize| {
            let (server, request) = (&server, json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0}));
            scope.spawn(move || server.complete(&request))
        };
        let (long, short) = (ask(prompt, 50), ask("b".into(), 50));
        let (status, answer) = long.join().unwrap();
        assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("length")), "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], json!(6));
        let (status, answer) = short.join().unwrap();
        assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(50)), "{answer}");
    });
    let (status, answer) = server.complete(&json!({"prompt": "a".repeat(limit + 1)}));
    assert!(status == 400 && answer["error"]["message"].as_str().unwrap().contains("context"), "{answer}");
}

#[test]
fn a_key_is_asked_for() {
    let server = Server::start(Limits { api_key: Some("secret".into()), ..Limits::default() });
    assert_eq!(server.ask("GET", "/v1/models", "", "").0, 401);
    assert_eq!(server.ask("GET", "/v1/models", "Authorization: Bearer secre\r\n", "").0, 401);
    let (status, _, body) = server.ask("GET", "/v1/models", "Authorization: Bearer secret\r\n", "");
    assert!(status == 200 && body.contains("\"id\":\"tiny\""), "{body}");
    assert_eq!(server.ask("GET", "/health", "", "").0, 200);
}

#[test]
fn a_full_queue_says_so_and_a_client_that_leaves_frees_its_slot() {
    let server = Server::start(Limits { slots: 1, queue: 1, ..Limits::default() });
    let endless = json!({"prompt": "a", "max_tokens": 100_000_000, "temperature": 0, "stream": true}).to_string();
    let mut first = server.send("POST", "/v1/completions", "", &endless);
    let mut byte = [0];
    first.read_exact(&mut byte).unwrap();
    let second = server.send("POST", "/v1/completions", "", &endless);
    // The second waits in the queue; when it is there, a third has no place.
    let start = Instant::now();
    loop {
        let request = json!({"prompt": "a", "max_tokens": 1}).to_string();
        let mut third = server.send("POST", "/v1/completions", "", &request);
        third.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut text = String::new();
        let _ = third.read_to_string(&mut text);
        if text.starts_with("HTTP/1.1 429") {
            assert!(text.to_lowercase().contains("retry-after: 1"), "{text}");
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{text}");
    }
    drop((first, second));
    let (status, answer) = server.complete(&json!({"prompt": "a", "max_tokens": 1}));
    assert!(status == 200 || status == 429, "{answer}");
    let start = Instant::now();
    while server.complete(&json!({"prompt": "a", "max_tokens": 1})).0 != 200 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}
