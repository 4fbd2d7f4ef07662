"""rayft against TRL's SFTTrainer, in turn in one run: `python -m tests.bench.sft`. One JSON line per comparison.

Every measurement is a process of its own. TRL's settings are all tried once, for two steps, and the fastest is measured
in alternation with rayft; the figures are medians over the rounds, the ratio the median of the rounds' ratios. At the end
TRL runs once more in the environment that rayft gives its workers (`rayft.train.group.worker_environment`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rayft.train.group import worker_environment
from tests.bench.side_rayft import job_of
from tests.bench.side_trl import SETTINGS
from tests.bench.workload import RANDOM_MODELS, Workload, flops_per_token, write_model, write_rows

ROOT = Path(__file__).resolve().parents[2]


def measure(
    side: str, work: Workload, *arguments: str, timeout_s: float, as_trainer: bool = False
) -> dict[str, Any]:
    """One run of a side. Raises RuntimeError with the end of its output if it fails.

    as_trainer: start it with the environment that the trainer gives its workers.
    """
    command = [sys.executable, "-m", f"tests.bench.side_{side}", work.to_json(), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"}
    if as_trainer:
        env |= worker_environment(job_of(work, Path()), stage=0)
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:4])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(work: Workload, settings: list[str], rounds: int, timeout_s: float) -> dict[str, Any]:
    """Measure both sides `rounds` times in turn and put the medians side by side."""
    short = replace(work, warmup=1, steps=2)
    tried = {name: measure("trl", short, name, timeout_s=timeout_s) for name in settings if len(settings) > 1}
    best = max(tried, key=lambda name: tried[name]["tokens_per_s"], default=settings[0])
    trl, rayft = [], []
    for _ in range(rounds):
        rayft.append(measure("rayft", work, timeout_s=timeout_s, as_trainer=True))
        trl.append(measure("trl", work, best, timeout_s=timeout_s))
    alike = measure("trl", work, best, timeout_s=timeout_s, as_trainer=True)
    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in zip(rayft, trl, strict=True)]
    ours, theirs = summary(work, rayft), summary(work, trl)
    return {
        "bench": f"sft {work.method} {work.precision} {Path(work.rows).stem} {Path(work.model).name}",
        "unit": "real tokens/s",
        "rayft": ours["tokens_per_s"],
        "trl": theirs["tokens_per_s"],
        "ratio": round(median(ratios), 2),
        "memory_ratio": round(ours["peak_memory_gb"] / theirs["peak_memory_gb"], 2),
        "ratio_in_the_same_environment": round(ours["tokens_per_s"] / alike["tokens_per_s"], 2),
        "rayft_details": ours,
        "trl_details": {
            **theirs,
            "setting": best,
            "tried": {name: round(result["tokens_per_s"], 1) for name, result in tried.items()},
        },
        "trl_in_the_same_environment": summary(work, [alike]),
        "device": work.device,
        "threads": work.threads,
        "rounds": rounds,
    }


def summary(work: Workload, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the fraction of the matrix rate is taken run by run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(work.model)
    fractions = [
        result["tokens_per_s"]
        * flops_per_token(config, work.method, result["trained_tokens"] / result["tokens"])
        / result["matrix_rate"]
        for result in results
    ]
    merged = {
        "tokens_per_s": round(median(result["tokens_per_s"] for result in results), 1),
        "peak_memory_gb": round(median(result["peak_memory_gb"] for result in results), 2),
        "padding": round(results[0]["padding"], 3),
        "tokens": results[0]["tokens"],
        "trained_tokens": results[0]["trained_tokens"],
        "matrix_rate_tflops": round(median(result["matrix_rate"] for result in results) / 1e12, 3),
        "fraction_of_matrix_rate": round(median(fractions), 3),
    }
    if "seconds" in results[0]:
        merged["seconds"] = results[len(results) // 2]["seconds"]
    return merged


def workloads(arguments: argparse.Namespace, folder: Path) -> Iterator[Workload]:
    """The comparisons asked for."""
    count = arguments.batch * (arguments.warmup + arguments.steps)
    rows = {name: str(write_rows(name, count, folder)) for name in arguments.rows}
    models = {name: str(write_model(name, folder)) for name in arguments.models}
    for name, model in models.items():
        for rows_path in rows.values():
            for precision in arguments.precisions:
                for method in arguments.methods:
                    yield Workload(
                        method,
                        precision,
                        model,
                        name in RANDOM_MODELS,
                        rows_path,
                        arguments.batch,
                        arguments.steps,
                        arguments.warmup,
                        arguments.max_length,
                        arguments.threads,
                        arguments.device,
                    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sft", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16", "pure_bf16"], choices=["bf16", "pure_bf16"]
    )
    parser.add_argument("--rows", nargs="+", default=["rl_gsm8k", "sft_oasst"])
    parser.add_argument("--models", nargs="+", default=["1b", "8b"] if gpu else ["smollm2"])
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="of TRL"
    )
    parser.add_argument("--batch", type=int, default=8, help="rows per optimizer step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--timeout-s", type=float, default=1800, help="for one run of a side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        for work in workloads(arguments, Path(folder)):
            result = compare(work, arguments.settings, arguments.rounds, arguments.timeout_s)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
