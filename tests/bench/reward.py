"""Reward models on real ratings: rayft against TRL's RewardTrainer, `python -m tests.bench.reward`. One JSON line a data set.

Both sides get the same model (SmolLM2-135M-Instruct with the same new score head), the same rows, the same number of
steps, the same rows a step, learning rate and precision; each trains in processes of its own. The suite `preference` on
the test split measures both, each side's scores being those of its own forward on its own tokens: TRL trains the score at the line
end that the chat template puts after the last turn, rayft at the token that ends the turn. Labelled rows have no pairs, which TRL needs: it gets each good answer
with a bad one of the same domain, as many answers a step as rayft.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayft.spec import Suite
from tests.bench.workload import write_model
from tests.shared import shared_root

ROOT = Path(__file__).resolve().parents[2]

#: Data set -> steps, answers' rows a step, max_length.
DATA = {
    "pref_convarg": (40, 8, 512),
    "pref_qa_feedback": (20, 8, 1024),
    "pref_oasst": (25, 8, 768),
    "feedback_taskmaster": (40, 16, 512),
}

#: TRL's micro-batch: four pairs of pref_qa_feedback need more than 24 GB.
PAIRS_AT_A_TIME = 2


def base_model(folder: Path, seed: int) -> Path:
    """SmolLM2 with a new score head, as a sequence classifier that both sides load."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rayft.model.files import NewScore
    from rayft.model.weights import new_score

    source = write_model("smollm2", folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    model.score.weight.data = new_score(model.score.weight.shape, NewScore(1, seed))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    path = shared_root() / "data" / name / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fitting(name: str, base: Path, max_length: int) -> list[dict[str, Any]]:
    """Training rows all of whose answers fit into max_length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def longest(row: dict[str, Any]) -> int:
        answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
        return max(
            len(tokenizer.apply_chat_template(row["prompt"] + answer, return_dict=False))
            for answer in answers
        )

    return [row for row in rows_of(name, "train") if longest(row) <= max_length]


def as_pairs(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Pairs of whole conversations; of labelled rows a good one with a bad one of the same domain."""
    if "chosen" in rows[0]:
        return [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in rows]
    rng = random.Random(seed)
    pairs = []
    for domain in sorted({row["domain"] for row in rows}):
        good, bad = (
            [r["prompt"] + r["completion"] for r in rows if r["domain"] == domain and r["label"] is label]
            for label in (True, False)
        )
        most = max(len(good), len(bad))
        for side in (good, bad):
            rng.shuffle(side)
        pairs += [{"chosen": good[i % len(good)], "rejected": bad[i % len(bad)]} for i in range(most)]
    rng.shuffle(pairs)
    return pairs


def train_rayft(work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`rayft run` on two workers; returns the model's folder and the seconds in all."""
    job = {
        "name": "bench",
        "method": "reward",
        "storage": str(folder / "runs"),
        "seed": work["seed"],
        "model": {"path": work["base"]},
        "reward": {"center_coef": 0.0},
        "data": {
            "train": [{"path": work["rows"]}],
            "max_length": work["max_length"],
            "contradictions": "keep",
        },
        "train": {
            "global_batch_size": work["batch"],
            "max_steps": work["steps"],
            "learning_rate": work["learning_rate"],
            "lr_scheduler": "linear",
            "warmup_steps": 0,
            "precision": "bf16",
        },
        "cluster": {"num_workers": 2},
        "checkpoint": {"every_steps": work["steps"]},
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    began = time.monotonic()
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "rayft.cli", "run", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"rayft ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"model": str(folder / "runs" / "bench" / "model"), "seconds": round(time.monotonic() - began)}


def train_trl(work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """RewardTrainer in a process of its own (`--trl`)."""
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "tests.bench.reward",
        "--trl",
        json.dumps({**work, "out": str(folder / "trl")}),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL failed:\n{done.stderr[-3000:]}")
    return {"model": str(folder / "trl"), "seconds": round(time.monotonic() - began)}


def trl(work: dict[str, Any]) -> None:
    """Train with TRL as `work` says and save the model."""
    import torch

    torch.set_num_threads(2)
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = [json.loads(line) for line in Path(work["rows"]).read_text().splitlines()]
    pairs = as_pairs(rows, work["seed"])
    batch = work["batch"] if "chosen" in rows[0] else work["batch"] // 2
    tokenizer = AutoTokenizer.from_pretrained(work["base"])
    model = AutoModelForSequenceClassification.from_pretrained(
        work["base"], num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
    )
    trainer = RewardTrainer(
        model,
        args=RewardConfig(
            output_dir=f"{work['out']}-checkpoints",
            per_device_train_batch_size=PAIRS_AT_A_TIME,
            gradient_accumulation_steps=batch // PAIRS_AT_A_TIME,
            max_steps=work["steps"],
            max_length=work["max_length"] + 1,
            learning_rate=work["learning_rate"],
            lr_scheduler_type="linear",
            seed=work["seed"],
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(work["out"])


class OwnForward:
    """Scores by transformers' own sequence classifier, of documents with what the chat template puts after them."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text: Any = self.tokenizer.apply_chat_template(turns, tokenize=False)
        self._tail = self.tokenizer(text.rpartition(self.tokenizer.eos_token)[2])["input_ids"]
        self.context = None

    def rate(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """The score of each document."""
        import torch

        with torch.no_grad():
            return [self.model(torch.tensor([[*ids, *self._tail]])).logits[0].tolist() for ids in documents]


def accuracy(model: str, name: str, *, own_forward: bool) -> dict[str, float]:
    """The suite `preference` on the test split; own_forward: scores as transformers computes them."""
    from rayft.evals.run import run_suites
    from rayft.generate.scores import ScoreEngine, load_score_model

    path = str(shared_root() / "data" / name / "test.jsonl")
    by = {"by": "domain"} if name == "feedback_taskmaster" else {}
    suite = Suite.model_validate({"name": name, "type": "preference", "path": path, **by})
    engine: Any
    if own_forward:
        engine = OwnForward(model)
        tokenizer = engine.tokenizer
    else:
        module, tokenizer = load_score_model(model)
        engine = ScoreEngine(module, batch_size=8)
    found = run_suites([suite], engine, tokenizer)[name]
    return {key: round(value, 4) for key, value in found.items()}


def compare(name: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """One data set. The measure is the accuracy, of labelled rows the AUC."""
    steps, batch, max_length = DATA[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = base_model(folder, seed)
        rows = fitting(name, base, max_length)
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        work = {
            "base": str(base),
            "rows": str(path),
            "steps": steps,
            "batch": batch,
            "max_length": max_length,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        before = accuracy(str(base), name, own_forward=False)
        sides = {"rayft": train_rayft(work, folder), "trl": train_trl(work, folder)}
        found = {
            side: accuracy(result["model"], name, own_forward=side == "trl") for side, result in sides.items()
        }
    measure = "auc" if "auc" in before else "accuracy"
    ours, theirs = found["rayft"][measure], found["trl"][measure]
    return {
        "bench": f"reward {name}",
        "unit": measure,
        "rayft": ours,
        "trl": theirs,
        "ratio": round(ours / theirs, 3),
        "stderr": found["rayft"][f"{measure}_stderr"],
        "within_one_stderr": ours >= theirs - found["trl"][f"{measure}_stderr"],
        "before": before[measure],
        "steps": steps,
        "rows_a_step": batch,
        "rows": len(rows),
        "learning_rate": learning_rate,
        "seed": seed,
        "seconds": {side: result["seconds"] for side, result in sides.items()},
        "rayft_details": found["rayft"],
        "trl_details": found["trl"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reward", description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.trl:
        trl(json.loads(arguments.trl))
        return
    for name in arguments.data:
        print(json.dumps(compare(name, arguments.learning_rate, arguments.seed)), flush=True)


if __name__ == "__main__":
    main()
