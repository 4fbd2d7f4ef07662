"""Preference methods against TRL's trainers: same model, same rows in the same order, from messages to the last loss."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cluster.methods import METHODS
from tests.cluster.steps import (
    Fragments,
    learner_of,
    plan_of,
    prepare_folder,
    small_job,
    state_of,
    step_plans,
    train_steps,
    with_filled_adapters,
)
from tests.ranks import run_ranks
from tests.tiny import tiny_tokenizer

STEPS = 20
ADAPTER = {"type": "lora", "lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}

#: ChatML whose line ends stand before turns, since TRL counts what follows the last turn as part of the answer.
TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_folder(tmp_path_factory.mktemp("preferences"))
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def job_of(folder: Path, name: str, adapter: dict[str, Any]) -> Any:
    model = {"path": str(folder / "model"), "chat_template": str(folder / "template.jinja")}
    train = {"lr_scheduler": "constant", "warmup_steps": 0, "micro_batch_size": 1}
    return small_job(folder, name, model=model, adapter=adapter, train=train)


def _rayft(folder: Path, name: str, adapter: dict[str, Any]) -> dict[str, Any]:
    """Losses of all steps and the weights before the first, on two ranks under ZeRO-2, packed."""
    plan = plan_of(job_of(folder, name, adapter), folder, stage=2, packed=True)
    learner = learner_of(plan, folder)
    start = with_filled_adapters(state_of(learner))
    learner.load(Fragments(start), 0)  # type: ignore[arg-type]
    losses, _ = train_steps(learner, plan, folder, STEPS)
    learner.close()
    return {
        "losses": [loss for loss, _ in losses],
        "start": {parameter: data for (parameter, kind), data in start.items() if kind == "param"},
    }


def rows_in_order(folder: Path, job: Any) -> list[dict[str, Any]]:
    """The rows of all steps in the order of reading, as the file has them."""
    rows = [json.loads(line) for line in Path(job.data.train[0].path).read_text().splitlines()]
    plan = plan_of(job, folder, stage=2, packed=True)
    order = [
        corpus.answers(documents[0])[0].start // len(documents)
        for corpus, step in step_plans(plan, folder, STEPS)
        for documents in step.row_documents
    ]
    assert len(order) == STEPS * job.train.global_batch_size
    picked = [rows[row] for row in order]
    if "margin" in rows[0]:
        picked = [{"margin": 0.0, **row} for row in picked]
    return picked


def trainer_of(name: str) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """TRL's trainer, its configuration and the settings that the job of this name has."""
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    if name == "reward":
        return trl.RewardTrainer, trl.RewardConfig, {"center_rewards_coefficient": 0.01}
    if name == "kto":
        return trl.KTOTrainer, trl.KTOConfig, {"beta": 0.1, "undesirable_weight": 1.5}
    if name == "orpo":
        return ORPOTrainer, ORPOConfig, {"beta": 0.1, "max_length": 2048}
    if name == "simpo":
        settings = {
            "loss_type": "simpo",
            "cpo_alpha": 0.0,
            "beta": 2.0,
            "simpo_gamma": 1.0,
            "max_length": 2048,
        }
        return CPOTrainer, CPOConfig, settings
    losses = {
        "dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        "dpo_normalized": {"loss_type": "sigmoid_norm", "beta": 2.0},
        "ipo": {"loss_type": "ipo"},
    }
    return trl.DPOTrainer, trl.DPOConfig, {"beta": 0.1, "max_length": None, **losses[name]}


def _trl(folder: Path, name: str, adapter: dict[str, Any], start: dict[str, np.ndarray]) -> list[float]:
    """Losses of the same steps by TRL, which gets the rows and nothing that rayft made of them but their order."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", TRL_EXPERIMENTAL_SILENCE="1")
    warnings.simplefilter("ignore")
    job = job_of(folder, name, adapter)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if job.method == "reward":
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder / "model", num_labels=1, **options
        )
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    trainer_class, config, settings = trainer_of(name)
    losses: list[float] = []

    class Recording(trainer_class):  # type: ignore[misc,valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    train = job.train
    trainer = Recording(
        model,
        args=config(
            output_dir=str(folder / f"trl-{name}"),
            per_device_train_batch_size=train.global_batch_size,
            max_steps=STEPS,
            train_sampling_strategy="sequential",
            learning_rate=train.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_epsilon,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows_in_order(folder, job)),
        processing_class=tokenizer,
        **reference_of(name, adapter, folder, options),
    )
    trained = {parameter: p for parameter, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    for parameter, p in trained.items():
        p.data.copy_(torch.from_numpy(start[parameter]).view_as(p))
    trainer.train()
    shutil.rmtree(folder / f"trl-{name}", ignore_errors=True)
    return losses


def reference_of(name: str, adapter: dict[str, Any], folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The reference that TRL is to use, and the adapter, which it adds itself: then it switches that off for a reference."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    if adapter:
        task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
        return {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task)}
    if name not in ("dpo", "dpo_normalized", "ipo", "kto"):
        return {}
    return {"ref_model": AutoModelForCausalLM.from_pretrained(folder / "model", **options)}


def compare(folder: Path, name: str, adapter: dict[str, Any]) -> None:
    measured = run_ranks(_rayft, 2, folder, name, adapter)[0]
    expected = run_ranks(_trl, 1, folder, name, adapter, measured["start"])[0]
    assert measured["losses"][0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(measured["losses"], expected, rtol=1e-5)
    assert abs(expected[-1] - expected[0]) > 1e-3, "nothing was learned, so nothing was compared"


#: Methods that TRL has too; conservative DPO it has only for the whole batch sorted.
NAMES = ("reward", "dpo", "kto", "orpo", "simpo", "ipo", "dpo_normalized")
assert set(NAMES) <= METHODS.keys()


@pytest.mark.parametrize(
    "name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.full) for name in NAMES[2:4])]
)
def test_losses_of_trl(folder: Path, name: str) -> None:
    """Full fine-tuning: 1e-6 at the first step, 1e-5 over 20."""
    compare(folder, name, {})


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES[4:])
def test_losses_of_trl_for_the_other_losses(folder: Path, name: str) -> None:
    compare(folder, name, {})


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_trl_with_an_adapter(folder: Path, name: str) -> None:
    compare(folder, name, ADAPTER)
