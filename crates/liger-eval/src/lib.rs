//! What a conversion kept and what it gained: perplexity and KL to the teacher by token position, time and memory of a
//! decoding step by length of the text, and the report that shows them; and scores of benchmarks, by
//! lm-evaluation-harness's definitions.

mod evaluate;
mod plot;
mod position;
mod report;
mod scorer;
mod speed;
mod table;
mod tasks;

pub use evaluate::{Score, TaskScores, evaluate};
pub use plot::{Axis, Line, Plot};
pub use position::{BUCKETS, Bucket, PositionScores, Subject, scores_by_position};
pub use report::{Answers, ConversionReport};
pub use scorer::{Likelihood, Request, loglikelihood};
pub use speed::{StepCost, step_cost};
pub use table::Table;
pub use tasks::{Item, Metric, Task};
