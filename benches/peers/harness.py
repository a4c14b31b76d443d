"""Scores a model folder with lm-evaluation-harness and compares it, item by item, with `liger eval`.

    pip install lm-eval transformers torch
    liger eval MODEL --tasks arc_easy,piqa --data-dir DATA --limit 300 --log-samples ours.jsonl
    python benches/peers/harness.py MODEL DATA 300 ours.jsonl arc_easy,piqa

MODEL: a folder in float32. DATA: NAME.jsonl files with the fields of the hub's data sets; the harness's own task files are
used, with the data read from there.
"""

import json
import sys

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

model, folder, limit, ours, names = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5].split(",")
manager = TaskManager()


def local(name):
    """The harness's task, with its data from the folder."""
    config = dict(manager._get_config(name)) if hasattr(manager, "_get_config") else manager.load_config(name)
    split = config.get("test_split") or config.get("validation_split")
    for key in ("dataset_name", "training_split", "fewshot_split", "group", "tag"):
        config.pop(key, None)
    config.update(task=name, dataset_path="json", dataset_kwargs={"data_files": {split: f"{folder}/{name}.jsonl"}},
                  num_fewshot=0)
    return config


own = {}
for line in open(ours):
    item = json.loads(line)
    own[item["task"], item["item"]] = item
results = lm_eval.simple_evaluate(
    model=HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=8), tasks=[local(name) for name in names],
    limit=limit, log_samples=True, bootstrap_iters=0, task_manager=manager)
for name in names:
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    same, worst, items = 0, 0.0, 0
    seen = set()
    for sample in samples:
        if sample["doc_id"] in seen:  # one entry a filter
            continue
        seen.add(sample["doc_id"])
        logs = [float(r[0]) for r in sample["filtered_resps"]]
        mine = own[name, sample["doc_id"]]["log_likelihoods"]
        items += 1
        same += max(range(len(logs)), key=logs.__getitem__) == max(range(len(mine)), key=mine.__getitem__)
        worst = max([worst] + [abs(a - b) / abs(a) for a, b in zip(logs, mine)])
    figures = {key: value for key, value in results["results"][name].items() if isinstance(value, float)}
    print(json.dumps({"task": name, "items": items, "same_choice": same, "worst_relative_difference": worst, **figures}))
