//! Typed access to the fields of a JSON object, with errors that name file and field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object that came from `path`.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(object: &'a Map<String, Value>, path: &'a Path) -> Self {
        Self { object, path }
    }

    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    fn wrong(&self, field: &str, found: &Value, expected: &str) -> Error {
        Error::field(self.path, field, found, expected)
    }

    fn required<T>(&self, field: &str, value: Option<T>, expected: &str) -> Result<T> {
        value.ok_or_else(|| Error::field(self.path, field, "nothing", expected))
    }

    pub(crate) fn optional_text(&self, field: &str) -> Result<Option<String>> {
        let text = |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| self.wrong(field, v, "a string"));
        self.get(field).map(text).transpose()
    }

    pub(crate) fn text(&self, field: &str) -> Result<String> {
        self.required(field, self.optional_text(field)?, "a string")
    }

    /// A positive number that fits a tensor's axis.
    pub(crate) fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let size = |v: &Value| {
            let size = v.as_u64().filter(|&n| n > 0 && n < 1 << 31);
            size.map(|n| n as usize).ok_or_else(|| self.wrong(field, v, "a positive whole number"))
        };
        self.get(field).map(size).transpose()
    }

    pub(crate) fn size(&self, field: &str) -> Result<usize> {
        self.required(field, self.optional_size(field)?, "a positive whole number")
    }

    pub(crate) fn optional_float(&self, field: &str) -> Result<Option<f64>> {
        let float = |v: &Value| v.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.wrong(field, v, "a number"));
        self.get(field).map(float).transpose()
    }

    pub(crate) fn positive(&self, field: &str) -> Result<Option<f64>> {
        match self.optional_float(field)? {
            Some(x) if x <= 0.0 => Err(Error::field(self.path, field, x, "a number above 0")),
            other => Ok(other),
        }
    }

    pub(crate) fn optional_bool(&self, field: &str) -> Result<Option<bool>> {
        self.get(field).map(|v| v.as_bool().ok_or_else(|| self.wrong(field, v, "true or false"))).transpose()
    }

    pub(crate) fn is_true(&self, field: &str) -> bool {
        self.get(field) == Some(&Value::Bool(true))
    }

    pub(crate) fn optional_texts(&self, field: &str) -> Result<Option<Vec<String>>> {
        let texts = |v: &Value| {
            let list = v.as_array().and_then(|a| a.iter().map(|t| t.as_str().map(str::to_owned)).collect());
            list.ok_or_else(|| self.wrong(field, v, "a list of strings"))
        };
        self.get(field).map(texts).transpose()
    }

    pub(crate) fn optional_object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.get(field).map(|v| v.as_object().ok_or_else(|| self.wrong(field, v, "an object"))).transpose()
    }

    /// One token id or a list of them.
    pub(crate) fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else {
            return Ok(Vec::new());
        };
        let list = match value {
            Value::Array(list) => list.iter().collect(),
            one => vec![one],
        };
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        list.into_iter().map(|v| id(v).ok_or_else(|| self.wrong(field, v, "a token id"))).collect()
    }
}
