"""The learner against TRL's SFTTrainer: same model, same rows in the same order, from messages to the last loss."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cluster.steps import (
    Fragments,
    first_gradients,
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
from tests.tiny import CHATML, tiny_tokenizer

STEPS = 20
ADAPTER = {"type": "lora", "lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}

#: The same ChatML with the answers marked, which is how TRL finds them.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("parity"))


def job_of(folder: Path, method: str, **train: Any) -> Any:
    settings = {"lr_scheduler": "constant", "warmup_steps": 0, "micro_batch_size": 2, **train}
    return small_job(folder, train=settings, adapter=ADAPTER if method == "lora" else {})


def _rayft(folder: Path, method: str) -> dict[str, Any]:
    """Losses of all steps, the gradients of the first and the weights before it, on two ranks under ZeRO-2."""
    plan = plan_of(job_of(folder, method), folder, stage=2, packed=True)
    learner = learner_of(plan, folder)
    start = with_filled_adapters(state_of(learner))
    learner.load(Fragments(start), 0)  # type: ignore[arg-type]
    losses, _ = train_steps(learner, plan, folder, STEPS)
    learner.close()
    unclipped = plan_of(job_of(folder, method, max_grad_norm=0.0), folder, stage=2, packed=True)
    return {
        "losses": [loss for loss, _ in losses],
        "gradients": first_gradients(unclipped, folder, start),
        "start": {name: data for (name, kind), data in start.items() if kind == "param"},
    }


def _trl(folder: Path, method: str, start: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same with SFTTrainer, which gets the messages and nothing that rayft made of them but their order."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    job = job_of(folder, method)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    plans = step_plans(plan_of(job, folder, stage=2, packed=True), folder, STEPS)
    # One document a row in one shard: a document's id is the number of its row.
    order = [
        document
        for _, plan in plans
        for rank in plan.micro_batches
        for batch in rank
        for pack in batch
        for document in pack
    ]
    assert len(order) == STEPS * job.train.global_batch_size
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )
    if method == "lora":
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(torch.from_numpy(start[name]).view_as(parameter))

    losses: list[float] = []
    gradients: dict[str, np.ndarray] = {}

    class Recording(SFTTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            losses.append(float(loss))
            if not gradients:
                gradients.update({n: p.grad.numpy().ravel().copy() for n, p in parameters.items()})
            return loss

    train = job.train
    trainer = Recording(
        model,
        args=SFTConfig(
            output_dir=str(folder / f"trl-{method}"),
            per_device_train_batch_size=train.global_batch_size,
            max_steps=STEPS,
            train_sampling_strategy="sequential",
            max_length=None,
            assistant_only_loss=True,
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
        ),
        train_dataset=Dataset.from_list([rows[document] for document in order]),
        processing_class=tokenizer,
    )
    trainer.train()
    return {"losses": losses, "gradients": gradients}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_gradients_of_trl(folder: Path, method: str) -> None:
    """Two ranks, ZeRO-2, packed, two micro-batches against TRL's one padded batch: 1e-6 first, 1e-5 over 20 steps."""
    measured = run_ranks(_rayft, 2, folder, method)[0]
    expected = run_ranks(_trl, 1, folder, method, measured["start"])[0]
    assert measured["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    np.testing.assert_allclose(measured["losses"], expected["losses"], rtol=1e-5)
    assert expected["losses"][-1] < 0.98 * expected["losses"][0]
    assert measured["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        difference = np.linalg.norm(measured["gradients"][name] - gradient)
        assert difference <= 1e-6 * np.linalg.norm(gradient), name
