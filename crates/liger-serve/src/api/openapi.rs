//! The description of the endpoints.

use serde_json::{Value, json};

/// An OpenAPI 3.1 document.
pub(super) fn document() -> Value {
    let number = |low: f64, high: f64| json!({"type": ["number", "null"], "minimum": low, "maximum": high});
    let count = |low: u64, high: u64| json!({"type": ["integer", "null"], "minimum": low, "maximum": high});
    let text = json!({"type": "string"});
    let texts = json!({"type": "array", "items": text});
    let flag = json!({"type": ["boolean", "null"]});
    let common = json!({
        "model": {"type": "string"}, "max_tokens": count(1, 1 << 20), "max_completion_tokens": count(1, 1 << 20),
        "temperature": number(0.0, 100.0), "top_p": number(1e-6, 1.0), "top_k": count(0, 1 << 20), "min_p": number(0.0, 1.0),
        "repetition_penalty": number(0.01, 100.0), "seed": count(0, u64::from(u32::MAX)), "stream": flag, "n": count(1, 128),
        "stop": {"anyOf": [text, texts]}, "state_id": {"type": "string", "pattern": "^state-[0-9a-f]{32}$"},
        "keep_state": {"type": "boolean"},
    });
    let with = |more: Value, required: &str| {
        let mut all = common.clone();
        if let (Some(all), Some(more)) = (all.as_object_mut(), more.as_object()) {
            all.extend(more.clone());
        }
        json!({"type": "object", "required": [required], "properties": all})
    };
    let turn =
        json!({"type": "object", "required": ["role", "content"], "properties": {"role": text, "content": text}});
    let turns = json!({"type": "array", "minItems": 1, "items": turn});
    let ids = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    let prompt = json!({"anyOf": [text, texts, ids, {"type": "array", "items": ids}]});
    let completion = with(json!({"prompt": prompt, "echo": flag, "logprobs": count(0, 20)}), "prompt");
    let chat = with(
        json!({"messages": turns, "logprobs": flag, "top_logprobs": count(0, 20),
        "tools": {"type": ["array", "null"], "items": {"type": "object"}}}),
        "messages",
    );
    let either = json!({"type": "object", "properties": {"prompt": text, "messages": turns, "state_id": text}});
    let body = |schema: &Value| json!({"required": true, "content": {"application/json": {"schema": schema}}});
    let answers = |success: &str, kind: &str| {
        let object = json!({"description": "It worked.", "content": {kind: {}}});
        let error = json!({"description": "An error in OpenAI's form.", "content": {"application/json":
            {"schema": {"$ref": "#/components/schemas/Error"}}}});
        json!({success: object, "default": error})
    };
    let ask = |summary: &str, schema: &Value| json!({"post": {"summary": summary, "requestBody": body(schema), "responses": answers("200", "application/json")}});
    let look = |summary: &str, kind: &str| json!({"summary": summary, "responses": answers("200", kind)});
    let id = json!([{"name": "id", "in": "path", "required": true, "schema": text}]);
    let mut of_state = json!({"get": look("A kept state", "application/json"),
        "delete": look("Remove a kept state", "application/json")});
    of_state["parameters"] = id.clone();
    let mut content = json!({"get": look("A kept state as a file", "application/octet-stream")});
    content["parameters"] = id.clone();
    let mut model = json!({"get": look("The model", "application/json")});
    model["parameters"] = id;
    let mut keep =
        ask("Keep the state of a text or conversation; as application/octet-stream, bring a file back", &either);
    keep["get"] = look("Kept states", "application/json");
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Liger", "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI's completions over states of fixed size."},
        "paths": {
            "/v1/completions": ask("Continue a text", &completion),
            "/v1/chat/completions": ask("Answer in a conversation", &chat),
            "/v1/models": {"get": look("The models", "application/json")},
            "/v1/models/{id}": model,
            "/v1/states": keep, "/v1/states/{id}": of_state, "/v1/states/{id}/content": content,
            "/tokenize": ask("The tokens of a text or conversation", &either),
            "/health": {"get": look("Whether the server answers", "application/json")},
            "/status": {"get": look("Slots, memory and speed now", "application/json")},
            "/metrics": {"get": look("Counters for Prometheus", "text/plain")},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "object",
                "required": ["message", "type"], "properties": {"message": text, "type": text}}}}},
        },
    })
}
