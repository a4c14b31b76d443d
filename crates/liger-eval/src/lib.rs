//! What a conversion kept and what it gained: benchmarks by lm-evaluation-harness's definitions; perplexity, KL and agreement
//! with the teacher by token position; recall probes; what each branch does; time and memory of a decoding step by length of
//! the text; and the reports that show them.

mod branches;
mod cache;
mod comparison;
mod conversion;
mod document;
mod evaluate;
mod greedy;
mod heat;
mod plot;
mod position;
mod recall;
mod run;
mod scorer;
mod speed;
mod table;
mod tasks;
mod writer;

pub use branches::{BranchScores, branch_scores};
pub use cache::{Cache, hash_files};
pub use comparison::{comparison, recall_table, recovery_table, shown};
pub use conversion::{Answers, ConversionReport, position_table};
pub use document::{Block, Document};
pub use evaluate::{Answer, Score, Surroundings, TaskScores, evaluate};
pub use greedy::{GreedyAgreement, greedy_agreement};
pub use heat::HeatMap;
pub use plot::{Axis, Line, Plot};
pub use position::{Bucket, PositionScores, Subject, scores_by_position};
pub use recall::{DEPTHS, Probe, RecallCell, RecallScores, recall};
pub use run::{EvaluationRun, LongText, ModelScores};
pub use scorer::{Likelihood, Request, loglikelihood};
pub use speed::{StepCost, step_cost};
pub use table::Table;
pub use tasks::{Item, Metric, Task, read_records};
pub use writer::{Until, generate_until};
