"""The same items scored by lm-evaluation-harness (transformers, CPU, float32) and by `liger eval`, one by one.

    python harness.py score --model FOLDER --data-dir benchmarks --limit 300 --out harness.jsonl
    liger eval FOLDER --tasks ... --data-dir benchmarks --limit 300 --device cpu --log-samples ours.jsonl
    python harness.py compare harness.jsonl ours.jsonl

`score` runs the harness's own task files; only their data sets are replaced by the local records.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

SPLITS = {
    "piqa": ("piqa/piqa.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "wikitext": ("wikitext/wikitext.yaml", "test"),
}
# Tasks that the harness has one of for each subject, with their examples.
SUBJECTS = {"mmlu": ("mmlu/default/mmlu_{}.yaml", 5), "mmlu_cloze": ("mmlu/continuation/mmlu_{}.yaml", 0)}
METRICS = ("acc", "acc_norm", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def records(folder, name):
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.zst"):
        if path.exists() and path.suffix == ".zst":
            import zstandard

            text = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().decode()
        elif path.exists():
            text = path.read_text()
        else:
            continue
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    raise SystemExit(f"{folder}: no {name}.jsonl or {name}.jsonl.zst")


class Writer:
    """Task files that include the harness's own and read our records."""

    def __init__(self, folder):
        import lm_eval

        self.folder = Path(folder)
        self.shipped = Path(lm_eval.__file__).parent / "tasks"

    def write(self, name, shipped, shots, **splits):
        files = {}
        for split, rows in splits.items():
            path = self.folder / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = str(path)
        lines = [
            f"include: {self.shipped / shipped}",
            f"task: {name}_local",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {json.dumps(files)}}}",
            f"num_fewshot: {shots}",
        ]
        # A split that is not there must not be asked for.
        for key in ("training", "validation", "test"):
            there = {"training": "train"}.get(key, key) in splits
            lines += [] if there else [f"{key}_split: null"]
        (self.folder / f"{name}_local.yaml").write_text("\n".join(lines) + "\n")
        return f"{name}_local"


def score(args):
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = Path(args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(folder)
        groups = {}
        for name in args.tasks.split(","):
            if name in SPLITS:
                shipped, split = SPLITS[name]
                rows = records(data, name)[: args.limit]
                groups[name] = [writer.write(name, shipped, 0, **{split: rows})]
                continue
            shipped, shots = SUBJECTS[name]
            rows, examples = records(data, "mmlu_test")[: args.limit], records(data, "mmlu_dev")
            groups[name] = []
            for subject in dict.fromkeys(row["subject"] for row in rows):
                of = lambda all_rows: [row for row in all_rows if row["subject"] == subject]
                local = writer.write(f"{name}_{subject}", shipped.format(subject), shots, test=of(rows), dev=of(examples))
                groups[name].append(local)
        kind, model_args = "hf", {"pretrained": args.model, "dtype": "float32"}
        if args.server:
            url, name = args.server.rstrip("/") + "/v1/completions", Path(args.model).resolve().name
            kind, model_args = "local-completions", {"model": name, "base_url": url, "tokenizer": args.model, "num_concurrent": 4}
        results = lm_eval.simple_evaluate(
            model=kind,
            model_args=model_args,
            tasks=[task for group in groups.values() for task in group],
            task_manager=TaskManager(include_path=folder),
            device=None if args.server else "cpu",
            batch_size=args.batch_size,
            log_samples=True,
            bootstrap_iters=0,
        )
    with open(args.out, "w") as out:
        for name, group in groups.items():
            i = 0
            for task in group:
                for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"]):
                    found = [r[0] if isinstance(r, (list, tuple)) else r for r in sample["filtered_resps"]]
                    scores = {m: sample[m] for m in METRICS if m in sample}
                    row = {"task": name, "item": i, "log_likelihoods": [float(x) for x in found], "scores": scores}
                    if name == "lambada_openai":
                        row["log_likelihoods"] = [float(sample["filtered_resps"][0][0])]
                    out.write(json.dumps(row) + "\n")
                    i += 1
            if len(group) == 1:
                values = {k.split(",")[0]: v for k, v in results["results"][group[0]].items() if k.split(",")[0] in METRICS}
                out.write(json.dumps({"task": name, "values": values}) + "\n")


def compare(args):
    def load(path):
        items, values = {}, {}
        for line in open(path):
            row = json.loads(line)
            if "values" in row:
                values[row["task"]] = row["values"]
            else:
                items[row["task"], row["item"]] = row
        return items, values

    theirs, their_values = load(args.harness)
    ours, _ = load(args.ours)
    print("task             items  same choice %  same by length %  largest relative difference")
    for task in dict.fromkeys(task for task, _ in theirs):
        keys = [key for key in theirs if key[0] == task and key in ours]
        if not keys:
            print(f"{task:15s} not in {args.ours}")
            continue
        same = by_length = 0
        worst = 0.0
        for key in keys:
            a, b = theirs[key]["log_likelihoods"], ours[key]["log_likelihoods"]
            assert len(a) == len(b), (key, len(a), len(b))
            same += a.index(max(a)) == b.index(max(b))
            lengths = ours[key].get("lengths") or [1] * len(a)
            normed = [[x / n for x, n in zip(side, lengths)] for side in (a, b)]
            by_length += normed[0].index(max(normed[0])) == normed[1].index(max(normed[1]))
            worst = max([worst] + [abs(x - y) / max(abs(x), 1e-9) for x, y in zip(a, b)])
        n = len(keys)
        print(f"{task:15s} {n:6d} {100 * same / n:14.2f} {100 * by_length / n:17.2f} {worst:28.2e}")
        if task == "lambada_openai":
            sums = [sum(side[key]["log_likelihoods"][0] for key in keys) for side in (theirs, ours)]
            print("    perplexity", *(f"{math.exp(-s / n):.4f}" for s in sums), f"harness {their_values.get(task)}")
        if task == "wikitext":
            sums = [sum(side[key]["log_likelihoods"][0] for key in keys) for side in (theirs, ours)]
            words = sum(ours[key]["words"] for key in keys)
            print("    word perplexity", *(f"{math.exp(-s / words):.4f}" for s in sums), f"harness {their_values.get(task)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("score")
    verb.add_argument("--model", required=True)
    verb.add_argument("--server", help="score what `liger serve MODEL` serves there, such as http://127.0.0.1:8080")
    verb.add_argument("--data-dir", required=True)
    verb.add_argument("--tasks", default=",".join([*SPLITS, *SUBJECTS]))
    verb.add_argument("--limit", type=int, default=300)
    verb.add_argument("--batch-size", type=int, default=8)
    verb.add_argument("--out", required=True)
    verb.set_defaults(run=score)
    verb = verbs.add_parser("compare")
    verb.add_argument("harness")
    verb.add_argument("ours")
    verb.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
