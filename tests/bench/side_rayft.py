"""One run of rayft's learner on a workload, in a process of its own: `python -m tests.bench.side_rayft WORKLOAD`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.workload import Workload, matrix_rate, peak_memory_gb


def job_of(work: Workload, folder: Path) -> Any:
    """The job file of the workload."""
    from rayft.spec import Job

    return Job.model_validate(
        {
            "name": "bench",
            "storage": str(folder),
            "model": {"path": work.model, "random_weights": work.random},
            "adapter": {"type": "lora" if work.method == "lora" else "none", "lora_r": 16, "lora_alpha": 32},
            "data": {"train": [{"path": work.rows}], "max_length": work.max_length, "too_long": "truncate"},
            "train": {
                "global_batch_size": work.batch,
                "max_steps": work.warmup + work.steps,
                "precision": work.precision,
            },
            "cluster": {
                "threads_per_worker": work.threads,
                "gpus_per_worker": 1 if work.device == "cuda" else 0,
            },
        }
    )


def run(work: Workload) -> dict[str, Any]:
    """Train and report real tokens a second over the timed steps, seconds by phase, padding and the peak memory."""
    import torch.distributed as dist

    from rayft.data.cache import plan_cache, prepare_shard
    from rayft.data.step import plan_step
    from rayft.data.template import ChatTokenizer
    from rayft.learner.schedule import learning_rate
    from rayft.model.files import load_config, load_tokenizer, resolve_model
    from rayft.storage import node_cache_dir, open_store
    from rayft.train import setup
    from rayft.train.group import RunPlan
    from rayft.train.prepare import decide_packing, decide_stage

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = job_of(work, folder)
        setup.use_threads(job)
        os.environ["LOCAL_RANK"] = "0"
        backend = "nccl" if work.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        files = resolve_model(job.model, node_cache_dir())
        tokenizer = load_tokenizer(files, job.model)
        spec = plan_cache(
            job.data.train, job.data, ChatTokenizer(tokenizer, job.data.loss_on), node_dir=folder
        )
        cache = str(folder / "cache")
        for shard in spec.shards:
            prepare_shard(spec, shard.index, open_store(cache), node_dir=folder)
        packed = decide_packing(job, load_config(files, job.model))
        stage, _ = decide_stage(job, files)
        total = work.warmup + work.steps
        plan = RunPlan(job, str(folder / "run"), {}, stage, packed, spec, None, cache, total, None, total)
        learner = setup.build_learner(plan, files, setup.pad_id_of(tokenizer))
        corpus, order = setup.open_corpus(plan, spec), setup.order_of(plan)

        position, tokens, trained, computed, elapsed = 0, 0, 0, 0, 0.0
        seconds: dict[str, float] = {}
        for step in range(total):
            started = time.perf_counter()
            step_plan = plan_step(
                corpus, order, position, data=job.data, train=job.train, packed=packed, world_size=1
            )
            batches = [learner.objective.collate(corpus, micro) for micro in step_plan.micro_batches[0]]
            planned = time.perf_counter()
            result = learner.step(batches, step_plan.trained_tokens, learning_rate(job.train, step, total))
            position = step_plan.next_position
            if step < work.warmup:
                continue
            elapsed += time.perf_counter() - started
            tokens, trained = tokens + step_plan.tokens, trained + step_plan.trained_tokens
            computed += step_plan.computed_tokens
            for phase, spent in {"data": planned - started, **result.seconds}.items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
        peak = peak_memory_gb(work.device)
        seconds["checkpoint"] = _checkpoint(plan, learner, total)
        learner.close()
        dist.destroy_process_group()
    return {
        "tokens_per_s": tokens / elapsed,
        "tokens": tokens,
        "trained_tokens": trained,
        "padding": 1 - tokens / computed,
        "peak_memory_gb": peak,
        "matrix_rate": matrix_rate(work.device),
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
    }


def _checkpoint(plan: Any, learner: Any, step: int) -> float:
    """Seconds for which saving one checkpoint holds up training."""
    from rayft.checkpoint import CheckpointWriter, Lease
    from rayft.storage import open_store

    store = open_store(plan.run_uri)
    lease = Lease.acquire(store, {"user": "bench"})
    writer = CheckpointWriter(store, lease.epoch, 0, 1)
    started = time.perf_counter()
    writer.save(step, learner.fragments(), {})
    held = time.perf_counter() - started
    writer.close()
    lease.release()
    return held


if __name__ == "__main__":
    print(json.dumps(run(Workload.from_json(sys.argv[1]))))
