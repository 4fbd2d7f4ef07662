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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rayft.checkpoint import CheckpointReader, CheckpointWriter, Fragment
from rayft.errors import JobError, StorageError
from rayft.model.adapters import add_adapter
from rayft.model.export import export_model
from rayft.model.files import ModelFiles, resolve_model
from rayft.model.load import build_model
from rayft.model.trained import Adapted
from rayft.spec import Job, Model, parse_job
from rayft.storage import LocalStore
from tests.tiny import FAMILIES, save_tiny, tiny_config, tiny_tokenizer

pytest_plugins = ["tests.s3"]

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


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_random_weights_are_exported_in_the_familys_layout(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    job = make_job(tmp_path / "base")
    job = job.model_copy(update={"model": job.model.model_copy(update={"random_weights": True})})
    files = resolve_model(job.model, tmp_path / "cache")
    module = trained(job, files)
    export_model(checkpoint(module, tmp_path / "run"), files, job, tmp_path / "out", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert largest_difference(loaded, module) == 0.0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        layout = "\n".join(file.keys())
    assert ("embed_out.weight" if family == "gpt_neox" else "experts.3.w1.weight") in layout


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


def exported(tmp_path: Path, **adapter: Any) -> tuple[Job, ModelFiles, CheckpointReader]:
    base = save_tiny(tmp_path / "base")
    job, files = make_job(base, **adapter), resolved(base, tmp_path / "cache")
    return job, files, checkpoint(trained(job, files), tmp_path / "run")


def test_cast_and_shards(tmp_path: Path) -> None:
    job, files, reader = exported(tmp_path, use_rslora=True)
    out = tmp_path / "out"
    report = export_model(reader, files, job, out, prompts=PROMPTS, max_shard_bytes=20_000)
    assert sorted(out.glob("*.safetensors")) != []
    assert all(path.stat().st_size < 25_000 for path in out.glob("model-*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto", attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert report.proof is not None
    assert report.proof.merge_error < 1e-5 < report.proof.stored_error < 0.05

    whole = tmp_path / "whole"
    export_model(reader, files, job, whole, max_shard_bytes=20_000, dtype=torch.float32)
    in_fp32 = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16, attn_implementation="eager")
    assert largest_difference(loaded, in_fp32) == 0.0, "merged in fp32, then cast"


def test_a_checkpoint_in_bf16(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    job, files = make_job(base), resolved(base, tmp_path / "cache")
    module: nn.Module = build_model(files, job.model, dtype=torch.bfloat16, attention="eager")
    for parameter in module.parameters():
        parameter.data *= 1.5
    fragments = [
        Fragment(
            name, "param", tuple(p.shape), "bfloat16", 0, p.detach().flatten().view(torch.uint16).numpy()
        )
        for name, p in module.named_parameters()
    ]
    store = LocalStore(tmp_path / "run")
    CheckpointWriter(store, 0, 0, 1, background=False).save(3, fragments, {})
    export_model(CheckpointReader(store, 3), files, job, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", attn_implementation="eager")
    assert largest_difference(loaded, module) == 0.0


def test_persistent_buffers_come_from_the_base_uncast(tmp_path: Path) -> None:
    values: dict[str, Any] = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    values |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = AutoConfig.for_model(**{**tiny_config().to_diff_dict(), **values, "model_type": "glm4_moe"})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(bias).copy_(torch.tensor([5.001, 5.002, 5.003, 5.004]))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    job, files = make_job(tmp_path / "base"), resolved(tmp_path / "base", tmp_path / "cache")
    export_model(checkpoint(trained(job, files), tmp_path / "run"), files, job, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.get_buffer(bias), model.get_buffer(bias))


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    job, files, reader = exported(tmp_path, lora_dropout=0.0)
    out = tmp_path / "out"
    export_model(reader, files, job, out, merge=False)
    (out / "notes.txt").write_text("mine")
    export_model(reader, files, job, out, max_shard_bytes=20_000)
    assert not (out / "adapter_config.json").exists()
    assert not (out / "adapter_model.safetensors").exists()
    export_model(reader, files, job, out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".export-*")), "no temporary folder is left"

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.csv").write_text("1,2")
    with pytest.raises(JobError, match="not empty and holds no export"):
        export_model(reader, files, job, tmp_path / "other")
    with pytest.raises(JobError, match="not empty and holds no export"):
        export_model(reader, files, job, files.folder)


def test_export_to_s3(tmp_path: Path, s3_bucket: str) -> None:
    job, files, reader = exported(tmp_path, lora_dropout=0.0)
    uri = f"s3://{s3_bucket}/runs/one/model"
    report = export_model(reader, files, job, uri, prompts=PROMPTS)
    assert report.uri == uri
    found = resolved(uri, tmp_path / "cache")  # type: ignore[arg-type]
    export_model(reader, files, job, tmp_path / "local", prompts=PROMPTS)
    assert found.identity == resolved(tmp_path / "local", tmp_path / "cache").identity


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    _, files, reader = exported(tmp_path, target_modules=["q_proj"])
    for other in (make_job(files.folder, target_modules=["q_proj", "v_proj"]), make_job(files.folder)):
        with pytest.raises(StorageError, match=r"does not belong to this job.*job\.yaml"):
            export_model(reader, files, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_merge_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, files, reader = exported(tmp_path, lora_dropout=0.0)
    read = Adapted.read

    def wrong(self: Adapted, name: str) -> torch.Tensor:
        return read(self, name) * (1.01 if name.endswith("layers.1.mlp.up_proj.weight") else 1.0)

    monkeypatch.setattr(Adapted, "read", wrong)
    with pytest.raises(StorageError, match=r"differs from base and adapter by .*not published"):
        export_model(reader, files, job, tmp_path / "out", prompts=PROMPTS)
    assert not (tmp_path / "out").exists()


def test_a_qlora_adapter_is_merged_into_the_unquantized_model(tmp_path: Path) -> None:
    job, files, reader = exported(tmp_path, lora_dropout=0.0)
    qlora = job.model_copy(update={"adapter": job.adapter.model_copy(update={"type": "qlora"})})
    report = export_model(reader, files, qlora, tmp_path / "out", prompts=PROMPTS)
    assert report.proof is not None
    assert report.proof.merge_error < 1e-5


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", num_hidden_layers=6)
    job, files = make_job(base, use_dora=True), resolved(base, tmp_path / "cache")
    adapted = Adapted(checkpoint(trained(job, files), tmp_path / "run"), files, job.model, job.adapter)
    most = 0

    def watch(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in adapted.module.parameters() if not p.is_meta))

    for module in adapted.module.modules():
        module.register_forward_hook(watch)
    adapted.adapted.logits(PROMPTS)
    layer = sum(p.numel() for p in adapted.adapted.units["base_model.model.model.layers.0"].parameters())
    embeddings = 264 * 32
    assert 0 < most <= max(layer, embeddings)
    assert all(parameter.is_meta for parameter in adapted.module.parameters())
