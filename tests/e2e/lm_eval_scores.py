"""Prints what lm-eval makes of a small task of local text: `lm_eval_scores.py FOLDER [URL]`.

With a URL through its local-completions, else with mlx-lm's own evaluation. A program of its own,
since our attention is not to be in place where mlx-lm evaluates.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

# The country's capital among others, and sentences of which one is broken.
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Norway": "Oslo",
}
SENTENCES = [
    ("One two three", [" four five six.", " house five six.", " three two three."]),
    ("She opened the door and", [" went in.", " in went the."]),
    ("3 + 4 =", [" 7", " 8", " 12", " 34"]),
    ("The sun rises in the", [" east.", " week."]),
]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def documents() -> list[dict[str, Any]]:
    cities = [f" {city}." for city in CAPITALS.values()]
    found = [
        {"text": f"The capital of {country} is", "choices": cities, "answer": i}
        for i, country in enumerate(CAPITALS)
    ]
    found += [
        {
            "text": f"User: What is the capital of {country}?\nAssistant:",
            "choices": cities,
            "answer": i,
        }
        for i, country in enumerate(CAPITALS)
    ]
    return found + [{"text": t, "choices": c, "answer": 0} for t, c in SENTENCES]


def mlx_lm_model(folder: str) -> Any:
    """In float32, as the server computes on a CPU."""
    import mlx.core as mx
    from mlx_lm.evaluate import MLXLM

    model = MLXLM(folder, use_chat_template=False)
    model._model.set_dtype(mx.float32)
    return model


def main(folder: str, url: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "documents.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in documents()))
        (Path(scratch) / "local_text.yaml").write_text(TASK.format(file=file))
        how: dict[str, Any] = {"model": None}
        if url is None:
            how = {"model": mlx_lm_model(folder)}
        else:
            arguments = {
                "base_url": f"{url}/v1/completions",
                "model": "nano",
                "tokenizer": folder,
                "tokenizer_backend": "huggingface",
                "num_concurrent": 4,
                "max_retries": 1,
            }
            how = {"model": "local-completions", "model_args": arguments, "batch_size": 4}
        manager = TaskManager(include_path=scratch, include_defaults=False)
        done = lm_eval.simple_evaluate(
            **how, tasks=["local_text"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
    samples = sorted(done["samples"]["local_text"], key=lambda sample: sample["doc_id"])
    scores = [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]
    greedy = [[bool(one[1]) for one in sample["filtered_resps"]] for sample in samples]
    result = done["results"]["local_text"]
    accuracy = {name: result[f"{name},none"] for name in ("acc", "acc_norm")}
    print(json.dumps({"scores": scores, "greedy": greedy, **accuracy}))


if __name__ == "__main__":
    main(*sys.argv[1:])
