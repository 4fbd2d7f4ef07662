"""Export: what plain transformers and PEFT load equals the trained model, whatever the family and the adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.checkpoint import CheckpointReader, CheckpointWriter, Fragment
from rayft.errors import StorageError
from rayft.model.adapters import add_adapter
from rayft.model.export import export_model
from rayft.model.files import ModelFiles, resolve_model
from rayft.model.load import build_model
from rayft.spec import Job, Model, parse_job
from rayft.storage import LocalStore
from tests.tiny import FAMILIES, save_tiny

PROMPTS = [list(range(30)), [5, 4, 3, 2, 1], list(range(100, 140))]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_job(path: Path, **adapter: Any) -> Job:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"path": str(path)},
        "data": {"train": [{"path": "x"}]},
    }
    if adapter:
        values["adapter"] = {"type": "lora", "lora_r": 4, "lora_alpha": 16, **adapter}
    return parse_job(values)


def resolved(path: Path, cache: Path) -> ModelFiles:
    return resolve_model(Model.model_validate({"path": str(path)}), cache)


def trained(job: Job, files: ModelFiles, size: float = 0.05) -> nn.Module:
    """The job's model after 'training': every trainable parameter moved by noise, LoRA's B away from zero."""
    module: nn.Module = build_model(files, job.model, dtype=torch.float32, attention="eager")
    module = add_adapter(module, job.adapter, seed=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def checkpoint(module: nn.Module, folder: Path) -> CheckpointReader:
    """A committed checkpoint of the module's trained parameters."""

    def fragments() -> Iterator[Fragment]:
        for name, p in module.named_parameters():
            if p.requires_grad:
                yield Fragment(name, "param", tuple(p.shape), "float32", 0, p.detach().reshape(-1).numpy())

    store = LocalStore(folder)
    CheckpointWriter(store, 0, 0, 1, background=False).save(3, fragments(), {})
    return CheckpointReader(store, 3)


@torch.no_grad()
def logits(module: nn.Module) -> list[torch.Tensor]:
    return [module(input_ids=torch.tensor([prompt])).logits[0].float() for prompt in PROMPTS]


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(logits(a), logits(b), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_loads_with_plain_transformers(family: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family)
    job, files = make_job(base), resolved(base, tmp_path / "cache")
    module = trained(job, files)
    report = export_model(
        checkpoint(module, tmp_path / "run"), files, job, tmp_path / "run" / "model", dtype=torch.float32
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype="auto", attn_implementation="eager"
    )
    assert loaded.dtype == torch.float32
    assert largest_difference(loaded, module) == 0.0
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as after,
    ):
        assert sorted(before.keys()) == sorted(after.keys()), "the base model's file layout is kept"
    assert report.proof is None
    assert set(report.files) >= {"config.json", "tokenizer.json", "generation_config.json", "README.md"}


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.0},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}
CELLS = [("llama", variant) for variant in VARIANTS]
CELLS += [("qwen3", variant) for variant in ("lora", "head", "embeddings")]
CELLS += [("gemma3_text", "dora"), ("gpt_neox", "lora"), ("mixtral", "lora"), ("qwen3_moe", "lora")]


@pytest.mark.parametrize(("family", "variant"), CELLS)
def test_adapters_merge_exactly_and_load_apart(family: str, variant: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family)
    job, files = make_job(base, **VARIANTS[variant]), resolved(base, tmp_path / "cache")
    module = trained(job, files)
    assert (
        largest_difference(module, AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"))
        > 0.1
    )
    reader = checkpoint(module, tmp_path / "run")

    report = export_model(reader, files, job, tmp_path / "merged", dtype=torch.float32, prompts=PROMPTS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert largest_difference(merged, module) < 2e-5
    assert report.proof is not None
    assert report.proof.merge_error < 1e-5
    assert report.proof.stored_error < 1e-5
    assert report.proof.adapter_effect > 0.05
    assert merged.config.tie_word_embeddings == module.config.tie_word_embeddings
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["proof"]["prompts"] == len(PROMPTS)

    export_model(reader, files, job, tmp_path / "apart", merge=False)
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "apart", attn_implementation="eager", dtype=torch.float32
    )
    assert largest_difference(apart, module) < 2e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "apart").chat_template
