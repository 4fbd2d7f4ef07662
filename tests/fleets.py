"""Fleets and jobs to render: the shipped profiles, and models by their sizes alone."""

from __future__ import annotations

from typing import Any

from rayft.fleet.render.manifest import Wishes
from rayft.fleet.render.run import Rendered, render
from rayft.plan.architecture import Architecture, read_architecture
from rayft.spec import Job, load_job
from rayft.spec.profile import Profile, load_profile
from tests.shared import ROOT

PROFILES = ("cpu", "gpu", "aws-spot")
#: Qwen3-8B and SmolLM2-135M, as their config.json says.
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def large() -> Architecture:
    return read_architecture(QWEN3_8B)


def small() -> Architecture:
    return read_architecture(SMOLLM2)


def profile(name: str) -> Profile:
    """A shipped one."""
    return load_profile(ROOT / "cluster" / "profiles" / f"{name}.yaml")


def job(name: str, *overrides: str) -> Job:
    """A shipped one."""
    return load_job(ROOT / "jobs" / f"{name}.yaml", overrides)


#: Name of the golden file -> profile, job, overrides, model, wishes. Model hub ids stand for what the image does not hold.
SHOWN: dict[str, tuple[str, str, list[str], dict[str, Any], Wishes]] = {
    "cpu-arithmetic": (
        "cpu",
        "sft_arithmetic",
        ["model.path=HuggingFaceTB/SmolLM2-135M-Instruct"],
        SMOLLM2,
        Wishes(),
    ),
    "gpu-sft": ("gpu", "sft_hub_gpu", [], QWEN3_8B, Wishes("urgent", 24)),
    "gpu-grpo": ("gpu", "grpo_hub_gpu", ["name=2026_math.v2"], QWEN3_8B, Wishes()),
    "gpu-ppo": ("gpu", "ppo_hub_gpu", [], QWEN3_8B, Wishes()),
    "gpu-tune": ("gpu", "tune_hub_gpu", [], QWEN3_8B, Wishes()),
    "aws-spot-lora": (
        "aws-spot",
        "sft_hub_gpu",
        ["cluster.gpu=L4-24GB", "cluster.num_workers=9", "adapter.type=lora", "data.max_length=4096"],
        QWEN3_8B,
        Wishes(),
    ),
}


def shown(name: str) -> Rendered:
    """One of `SHOWN`, rendered from the repository's root."""
    where, what, overrides, config, wishes = SHOWN[name]
    asked, model = job(what, *overrides), read_architecture(config)
    scorers = {source.path: model for source in asked.rewards if source.type == "model"}
    return render(asked, profile(where), wishes, architecture=model, scorers=scorers)
