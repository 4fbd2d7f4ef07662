"""A random model of 1.1B parameters under ZeRO-3 on two ranks: no process ever holds the whole of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rayft.checkpoint import CheckpointReader, CheckpointWriter, latest
from rayft.storage import LocalStore, open_store
from rayft.train import group, setup
from tests.cluster.steps import learner_of, plan_of, small_job, state_digest, train_steps, write_rows
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_tokenizer

GB = 1e9
#: Widths of TinyLlama-1.1B (arXiv:2401.02385).
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.02,
}
NEEDED_GB = 18

pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc"),
    pytest.mark.skipif(
        psutil.virtual_memory().available < NEEDED_GB * GB, reason=f"needs {NEEDED_GB} GB of free memory"
    ),
]


def peak() -> float:
    """Highest resident memory of this process so far, in bytes; what imports take is in the first one already."""
    import deepspeed  # noqa: F401  # and, through its autotuner, MLflow where that is installed
    import transformers.models.llama.modeling_llama  # noqa: F401

    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def write_model(folder: Path) -> int:
    """Random bf16 weights in shards of at most 300 MB; returns the number of parameters."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama", **SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def flush() -> None:
        file = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, parameter in parameters.items():
        if 2 * sum(t.numel() for t in shard.values()) + 2 * parameter.numel() > 300e6:
            flush()
        value = torch.empty(parameter.shape, dtype=torch.bfloat16)
        shard[name] = value.fill_(1) if parameter.ndim == 1 else value.normal_(0, 0.02, generator=generator)
    flush()
    total = {"total_size": sum(2 * p.numel() for p in parameters.values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    return sum(p.numel() for p in parameters.values())


def job_of(folder: Path) -> Any:
    train = {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 2, "precision": "pure_bf16"}
    return small_job(folder, train=train, zero={"stage": 3})


def _first(folder: Path) -> dict[str, Any]:
    """Load, train a step, save: the peak after each, and a digest of the state that was saved."""
    peaks = {"start": peak()}
    plan = plan_of(job_of(folder), folder, stage=3, packed=True)
    build = setup.build_sharded

    def measured(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        peaks["load"] = peak()
        return model

    setup.build_sharded = measured
    learner = learner_of(plan, folder)
    peaks["engine"] = peak()
    _, position = train_steps(learner, plan, folder, 1)
    peaks["step"] = peak()
    rank = torch.distributed.get_rank()
    writer = CheckpointWriter(LocalStore(folder / "run"), 0, rank, 2, background=False, timeout_s=300)
    writer.save(1, learner.fragments(), {"optimizer_step": learner.optimizer_step(), "position": position})
    peaks["checkpoint"] = peak()
    return {"peaks": peaks, "digest": state_digest(learner)}


def _second(folder: Path) -> dict[str, Any]:
    """Resume in a new process, then one more step."""
    peaks = {"start": peak()}
    plan = plan_of(job_of(folder), folder, stage=3, packed=True)
    learner = learner_of(plan, folder)
    reader = CheckpointReader(LocalStore(folder / "run"), 1)
    learner.load(reader, reader.state["optimizer_step"])
    peaks["resume"] = peak()
    digest = state_digest(learner)
    train_steps(learner, plan, folder, 1, first=1, start=reader.state["position"])
    peaks["step"] = peak()
    return {"peaks": peaks, "digest": digest}


def _export(folder: Path) -> dict[str, Any]:
    from rayft.model.export import export_model
    from rayft.model.files import resolve_model

    peaks = {"start": peak()}
    job = job_of(folder)
    files = resolve_model(job.model, folder / "node")
    reader = CheckpointReader(LocalStore(folder / "run"), 1)
    report = export_model(
        reader,
        files,
        job,
        open_store(folder / "exported"),
        merge=False,
        dtype=setup.compute_dtype(job),
        prompts=[],
    )
    peaks["export"] = peak()
    return {"peaks": peaks, "bytes": report.bytes}


def test_no_rank_holds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    count = write_model(tmp_path / "model")
    assert count > 1.05e9
    whole = 2.0 * count  # bytes of the weights in bf16
    write_rows(tmp_path / "rows.jsonl")
    job = job_of(tmp_path)
    for name, value in group.worker_environment(job, stage=3).items():
        monkeypatch.setitem(os.environ, name, value)

    first = run_ranks(_first, 2, tmp_path, timeout_s=600)
    assert latest(LocalStore(tmp_path / "run")) == 1
    second = run_ranks(_second, 2, tmp_path, timeout_s=600)
    export = run_ranks(_export, 1, tmp_path, timeout_s=600)[0]
    for rank, (one, two) in enumerate(zip(first, second, strict=True)):
        for name, found in (("first", one), ("second", two)):
            shown = ", ".join(f"{phase} {value / GB:.2f} GB" for phase, value in found["peaks"].items())
            print(f"rank {rank}, {name}: {shown}")
        assert one["digest"] == two["digest"]
        start = one["peaks"]["start"]
        # Own half and the shard of 0.3 GB that is being read.
        assert one["peaks"]["load"] - start < 0.7 * whole
        # Own halves of weights, master weights and gradients.
        assert one["peaks"]["engine"] - start < 1.7 * whole
        # And of two moments; a layer or two and their activations.
        assert one["peaks"]["step"] - start < 2.9 * whole
        # Saving copies what the rank owns of weights and moments.
        assert one["peaks"]["checkpoint"] - start < 4.4 * whole
        assert two["peaks"]["resume"] - two["peaks"]["start"] < 2.9 * whole
    print(f"export: {export['peaks']['start'] / GB:.2f} to {export['peaks']['export'] / GB:.2f} GB")
    assert export["bytes"] == pytest.approx(whole, rel=0.01)
    assert export["peaks"]["export"] - export["peaks"]["start"] < 0.5 * whole
