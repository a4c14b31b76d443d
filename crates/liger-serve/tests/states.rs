//! States as a feature: beginnings that are not read again, and states that clients keep.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;

use liger_serve::Limits;
use serde_json::{Value, json};
use support::Server;

/// The same prompts with and without the cache, bit by bit: log-probabilities and all.
#[test]
fn cached_and_uncached_answers_are_equal() {
    let system = "You are asked many things, and this is what you know of them all. ".repeat(12);
    let prompts: Vec<String> =
        (0..5).map(|i| format!("{system}{}", format!("Question {i}? ").repeat(1 + 9 * i))).collect();
    let ask = |limits: Limits| -> Vec<Value> {
        let server = Server::start(limits);
        let ask = |prompt: &String| {
            let request = json!({"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3});
            let (status, answer) = server.complete(&request);
            assert_eq!(status, 200, "{answer}");
            answer
        };
        prompts.iter().chain(&prompts).map(ask).collect()
    };
    let (cached, uncached) = (ask(Limits::default()), ask(Limits { prefixes: 0, ..Limits::default() }));
    for (i, (a, b)) in cached.iter().zip(&uncached).enumerate() {
        assert_eq!(a["choices"], b["choices"], "{i}");
        assert_eq!(b["usage"]["prompt_tokens_details"]["cached_tokens"], json!(0));
        let found = a["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() as usize;
        // The second prompt shows what it has in common with the first; the third begins there.
        let least = if i >= 5 {
            prompts[i - 5].len() - 257
        } else if i >= 2 {
            system.len() / 256 * 256
        } else {
            0
        };
        assert!(found >= least && found < prompts[i % 5].len(), "{i}: {found}, at least {least}");
    }
    // With room for two states, those that were used last stay, and answers are the same.
    for (a, b) in ask(Limits { prefixes: 2, ..Limits::default() }).iter().zip(&uncached) {
        assert_eq!(a["choices"], b["choices"]);
    }
}

fn with_states(folder: &Path) -> Server {
    Server::start(Limits { states: Some(folder.to_owned()), ..Limits::default() })
}

#[test]
fn states_go_on_fork_travel_and_outlive_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let whole = |server: &Server, prompt: &str| {
        let answer = server.complete(&json!({"prompt": prompt, "max_tokens": 8, "temperature": 0})).1;
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let go_on = |server: &Server, id: &str, prompt: &str| {
        let request = json!({"prompt": prompt, "state_id": id, "max_tokens": 8, "temperature": 0, "keep_state": true});
        let (status, answer) = server.complete(&request);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let (first, second, id, file);
    {
        let server = with_states(folder.path());
        let request = json!({"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "keep_state": true});
        let answer = server.complete(&request).1;
        id = answer["state_id"].as_str().unwrap().to_owned();
        let text = format!("Once upon a time{}", answer["choices"][0]["text"].as_str().unwrap());
        // The same text from the beginning, twice over: a state is not used up.
        (first, second) = (whole(&server, &format!("{text} there")), whole(&server, &format!("{text} was")));
        for (prompt, expected) in [(" there", &first), (" was", &second), (" there", &first)] {
            assert_eq!(go_on(&server, &id, prompt)["choices"][0]["text"], json!(expected));
        }
        let (_, _, body) = server.ask("GET", "/v1/states", "", "");
        assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["data"].as_array().unwrap().len(), 4);
        let (status, _, body) = server.ask("GET", &format!("/v1/states/{id}"), "", "");
        let about: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &about["tokens"]), (200, &json!(22)), "{about}");
        file = std::fs::read(folder.path().join(format!("{id}.safetensors"))).unwrap();
    }
    // Another server on the same folder, as after a restart.
    let server = with_states(folder.path());
    assert_eq!(go_on(&server, &id, " was")["choices"][0]["text"], json!(second));
    // A text that is only read.
    let (status, _, body) =
        server.ask("POST", "/v1/states", "", &json!({"prompt": " was", "state_id": id}).to_string());
    let read: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &read["tokens"]), (200, &json!(26)), "{read}");
    let (status, _, body) = server.ask("DELETE", &format!("/v1/states/{id}"), "", "");
    assert!(status == 200 && body.contains("\"deleted\":true"), "{body}");
    for path in [format!("/v1/states/{id}"), "/v1/states/..%2Fsecret".into(), "/v1/states/state-0".into()] {
        assert_eq!(server.ask("GET", &path, "", "").0, 404, "{path}");
    }
    let (status, answer) = server.complete(&json!({"prompt": "a", "state_id": id}));
    assert!(status == 404 && answer["error"]["param"] == json!("state_id"), "{answer}");
    // A file of another model, or of nothing, is no state.
    let octets = "Content-Type: application/octet-stream\r\n";
    let (status, _, body) = server.ask("POST", "/v1/states", octets, "nonsense");
    assert!(status == 400 && body.contains("no state of this model"), "{body}");
    drop(server);
    let broken = folder.path().join(format!("{id}.safetensors"));
    std::fs::write(&broken, &file[..file.len() / 2]).unwrap();
    let server = with_states(folder.path());
    let (status, answer) = server.complete(&json!({"prompt": "a", "state_id": id}));
    assert!(status == 409 && answer["error"]["message"].as_str().unwrap().contains("damaged"), "{answer}");
}

#[test]
fn metrics_status_and_the_page() {
    let server = Server::start(Limits::default());
    server.complete(&json!({"prompt": "a", "max_tokens": 3, "temperature": 0}));
    let (status, head, body) = server.ask("GET", "/metrics", "", "");
    assert!(status == 200 && head.contains("text/plain"), "{head}");
    for line in
        ["liger_requests_total 1", "liger_prompt_tokens_total 1", "liger_slots 8", "liger_first_token_seconds_count 1"]
    {
        assert!(body.lines().any(|found| found == line), "{line} in {body}");
    }
    let (_, _, body) = server.ask("GET", "/status", "", "");
    assert!(body.contains("\"slots\":8"), "{body}");
    let (status, head, body) = server.ask("GET", "/", "", "");
    assert!(status == 200 && head.contains("content-security-policy") && body.contains("<!doctype html>"), "{head}");
    assert!(!body.contains("http://") && !body.contains("https://"), "the page asks nothing of other hosts");
    let (status, _, body) = server.ask("POST", "/tokenize", "", "{\"prompt\": \"abc\"}");
    assert!(status == 200 && body.contains("[97,98,99]"), "{body}");
    let (_, _, body) = server.ask("GET", "/openapi.json", "", "");
    let document: Value = serde_json::from_str(&body).unwrap();
    assert!(document["paths"]["/v1/chat/completions"]["post"].is_object(), "{document}");
}

#[test]
fn more_connections_than_there_may_be_are_told_so() {
    let server = Server::start(Limits { connections: 2, ..Limits::default() });
    let open: Vec<_> = (0..2).map(|_| std::net::TcpStream::connect(server.address).unwrap()).collect();
    let start = std::time::Instant::now();
    while server.ask("GET", "/health", "", "").0 != 503 {
        assert!(start.elapsed().as_secs() < 10);
    }
    drop(open);
    let start = std::time::Instant::now();
    while server.ask("GET", "/health", "", "").0 != 200 {
        assert!(start.elapsed().as_secs() < 10);
    }
}
