"""The policy's loss against TRL's GRPOTrainer and RLOOTrainer: the same model, rollouts and scores, their own loss."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rayft.data.template import Sample
from rayft.model.attention import NAME, register_documents_attention
from rayft.model.head import install_nll_head
from rayft.objectives.advantages import group_relative, leave_one_out
from rayft.objectives.aggregation import token_weights
from rayft.objectives.policy import Clip, PolicyObjective, token_tensors
from tests.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPTS, GENERATIONS, LONGEST = 3, 4, 12
TEMPERATURE = 0.7

#: Method -> TRL's settings, ours of the objective, aggregation, scale of the groups (None: leave one out).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str | None]] = {
    "grpo": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        {"kl_in_loss": "k3", "kl_weighted": False},
        "sequence_mean",
        "group",
    ),
    "grpo_corrected": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        {"kl_in_loss": "k3"},
        "sequence_mean",
        "batch",
    ),
    "dr_grpo": ({"loss_type": "dr_grpo", "beta": 0.0}, {}, "constant", "none"),
    "dapo": (
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
        {"clip": Clip(0.2, 0.28)},
        "token_mean",
        "group",
    ),
    "gspo": (
        {
            "loss_type": "grpo",
            "beta": 0.0,
            "importance_sampling_level": "sequence",
            "epsilon": 3e-2,
            "epsilon_high": 4e-2,
        },
        {"ratio": "sequence_mean", "clip": Clip(3e-2, 4e-2)},
        "sequence_mean",
        "group",
    ),
    "rloo": ({"beta": 0.0}, {"ratio": "sequence"}, "sequence_mean", None),
}


def rollouts() -> dict[str, Any]:
    """Prompts and answers of uneven length, padded as TRL pads them, with log-probabilities a little off the model's own."""
    rng = np.random.default_rng(0)
    S = PROMPTS * GENERATIONS
    asked = np.repeat(rng.integers(2, 9, PROMPTS), GENERATIONS)
    said = rng.integers(1, LONGEST + 1, S)
    prompts = [rng.integers(0, 256, n) for n in asked]
    answers = [rng.integers(0, 256, n) for n in said]
    return {"prompts": prompts, "answers": answers, "scores": rng.normal(size=(PROMPTS, GENERATIONS))}


def padded(arrays: list[np.ndarray], left: bool, dtype: Any = torch.int64) -> torch.Tensor:
    longest = max(map(len, arrays))
    rows = [np.pad(a, (longest - len(a), 0) if left else (0, longest - len(a))) for a in arrays]
    return torch.from_numpy(np.stack(rows)).to(dtype)


def trl_loss(
    model: Any,
    folder: Path,
    settings: dict[str, Any],
    found: dict[str, Any],
    advantages: np.ndarray,
    rloo: bool,
) -> torch.Tensor:
    """TRL's own `_compute_loss` on these rollouts."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    shared = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": PROMPTS * GENERATIONS,
        "num_generations": GENERATIONS,
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
        **settings,
    }
    config, trainer_of = (RLOOConfig, RLOOTrainer) if rloo else (GRPOConfig, GRPOTrainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config(**shared),
            train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
            processing_class=tiny_tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = 1
    said = [len(answer) for answer in found["answers"]]
    inputs = {
        "prompt_ids": padded(found["prompts"], left=True),
        "prompt_mask": padded([np.ones(len(p)) for p in found["prompts"]], left=True),
        "completion_ids": padded(found["answers"], left=False),
        "completion_mask": padded([np.ones(n) for n in said], left=False),
        "advantages": torch.from_numpy(advantages).float(),
        "old_per_token_logps": padded(found["old"], False, torch.float32),
        "old_logps": torch.tensor([old.sum() for old in found["old"]], dtype=torch.float32),
        "ref_per_token_logps": padded(found["reference"], False, torch.float32),
        "num_items_in_batch": torch.tensor(sum(said)),
    }
    loss: torch.Tensor = trainer._compute_loss(model.train(), inputs)
    return loss


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_trl(name: str, tmp_path: Path) -> None:
    settings, own, aggregation, scale = CASES[name]
    rloo = scale is None
    if scale is not None:
        settings = {**settings, "scale_rewards": scale}
    register_documents_attention()
    source = save_tiny(tmp_path / "model")
    found = rollouts()
    scores = found["scores"]
    advantages = (leave_one_out(scores) if rloo else group_relative(scores, scale)).flatten()  # type: ignore[arg-type]
    samples = [
        Sample(np.concatenate([p, a]).astype(np.int32), np.arange(len(p) + len(a)) >= len(p))
        for p, a in zip(found["prompts"], found["answers"], strict=True)
    ]
    lengths = [len(answer) for answer in found["answers"]]

    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=NAME)
    install_nll_head(ours, chunk=16)
    objective = PolicyObjective(temperature=TEMPERATURE, **own)
    with torch.no_grad():
        current = objective.logprobs(ours, token_tensors(samples, {}, packed=True, pad_id=0))
    rng = np.random.default_rng(1)
    spread = 0.1 if name == "gspo" else 0.3
    ends = np.cumsum(lengths)[:-1]
    found["old"] = np.split(current.numpy() + rng.normal(0, spread, sum(lengths)).astype(np.float32), ends)
    found["reference"] = np.split(current.numpy() + rng.normal(0, 0.3, sum(lengths)).astype(np.float32), ends)
    weights = token_weights(lengths, aggregation, LONGEST)  # type: ignore[arg-type]
    columns = {
        "old_logprobs": found["old"],
        "reference": found["reference"],
        "importance": [np.ones(n) for n in lengths],
        "advantages": [np.full(n, a) for n, a in zip(lengths, advantages, strict=True)],
        "weights": [np.full(n, w) for n, w in zip(lengths, weights, strict=True)],
    }
    batch = token_tensors(samples, columns, packed=True, pad_id=0) | {"kl_coef": torch.tensor([0.04])}
    loss, metrics = objective.loss(ours, batch)
    loss.backward()

    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    expected = trl_loss(theirs, tmp_path, settings, found, advantages, rloo)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=2e-6)
    norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
    for (parameter, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * norm, parameter
    assert norm > 1e-3
    assert metrics["clip_fraction"] > 0, "nothing was clipped, so clipping was not compared"
