"""Steps of a small job through the real data path and the real learner, for tests that compare their losses."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayft.data.cache import plan_cache, prepare_shard
from rayft.data.corpus import Corpus
from rayft.data.formats import layouts_of
from rayft.data.order import Order
from rayft.data.step import StepPlan, plan_step
from rayft.data.template import ChatTokenizer
from rayft.learner.learner import Learner
from rayft.model.files import job_files, load_tokenizer
from rayft.spec import Job, parse_job
from rayft.storage import open_store
from rayft.train import setup
from rayft.train.group import RunPlan
from rayft.train.reference import compute_references
from tests.cluster.methods import METHODS, looks, plain_loss, scores_of, write_comparisons
from tests.tiny import save_tiny

WORDS = [
    "ray",
    "actor",
    "shard",
    "token",
    "step",
    "loss",
    "rank",
    "merge",
    "route",
    "queue",
    "limit",
    "batch",
    "node",
]


def write_rows(path: Path, count: int = 48, seed: int = 0) -> Path:
    """Conversations of uneven length."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            question = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def small_job(folder: Path, kind: str = "sft", **groups: Any) -> Job:
    """A job of one of `METHODS` over `folder`'s tiny model and rows; groups are merged over the defaults."""
    rows, own = METHODS[kind]
    values: dict[str, Any] = {
        "name": "small",
        "storage": str(folder / "runs"),
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / rows)}], "max_length": 256},
        "train": {
            "global_batch_size": 8,
            "max_steps": 20,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "weight_decay": 0.01,
            "warmup_steps": 2,
        },
    }
    for key, group in {**own, **groups}.items():
        values[key] = (
            {**values[key], **group}
            if isinstance(values.get(key), dict) and isinstance(group, dict)
            else group
        )
    return parse_job(values)


def prepare_folder(folder: Path, family: str = "llama", **model_arguments: Any) -> Path:
    """Tiny model and rows below `folder`."""
    save_tiny(folder / "model", family, **model_arguments)
    write_rows(folder / "rows.jsonl")
    write_comparisons(folder)
    return folder


def plan_of(job: Job, folder: Path, *, stage: int, packed: bool) -> RunPlan:
    """The run's plan with all data tokenised."""
    cache = open_store(folder / "cache")
    spec = plan_cache(
        job.data.train,
        job.data,
        ChatTokenizer(load_tokenizer(job_files(job, folder / "node"), job.model)),
        node_dir=folder / "node",
        allowed=layouts_of(job),
    )
    for shard in spec.shards:
        prepare_shard(spec, shard.index, cache, node_dir=folder / "node")
    steps = job.train.max_steps or 1
    return RunPlan(job, job.storage, {}, stage, packed, spec, None, str(folder / "cache"), steps, None, 1)


def learner_of(plan: RunPlan, folder: Path) -> Learner:
    """This rank's learner, which knows the reference's log-probabilities if it needs them."""
    files = job_files(plan.job, folder / "node")
    learner = setup.build_learner(plan, files, pad_id=256)
    if plan.job.method == "dpo" and plan.job.dpo.needs_reference:
        corpora, steps = zip(*step_plans(plan, folder, plan.total_steps), strict=True)
        compute_references(learner, corpora[0], steps, dist.get_rank(), setup.gather)
    return learner


def step_plans(plan: RunPlan, folder: Path, count: int, start: int = 0) -> Iterator[tuple[Corpus, StepPlan]]:
    """Plans of `count` steps from position `start`."""
    corpus = Corpus(plan.train_spec, open_store(plan.cache_uri), node_dir=folder / "node")
    order = Order.of(plan.train_spec, plan.job.seed)
    position = start
    for _ in range(count):
        step = plan_step(
            corpus,
            order,
            position,
            data=plan.job.data,
            train=plan.job.train,
            packed=plan.packed,
            world_size=dist.get_world_size() if dist.is_initialized() else 1,
            together=plan.job.method != "sft",
        )
        position = step.next_position
        yield corpus, step


def train_steps(
    learner: Learner, plan: RunPlan, folder: Path, count: int, *, first: int = 0, start: int = 0
) -> tuple[list[tuple[float, float]], int]:
    """Losses and gradient norms of `count` steps from step `first` at position `start`, and the position after them."""
    from rayft.learner.schedule import learning_rate

    results = []
    position = start
    for number, (corpus, step) in enumerate(step_plans(plan, folder, count, start), start=first):
        setup.seed_step(plan.job.seed, number, dist.get_rank())
        objective, rank = learner.objective, dist.get_rank()
        objective.begin_step(learner.infer, corpus, step, rank)
        batches = [objective.collate(corpus, batch) for batch in step.micro_batches[rank]]
        rate = learning_rate(plan.job.train, number, plan.total_steps)
        result = learner.step(batches, objective.denominator(step), rate)
        results.append((result.loss, result.grad_norm))
        position = step.next_position
    return results, position


def state_digest(learner: Learner) -> str:
    """A digest of this rank's fragments: names, places and bits."""
    digest = hashlib.sha256()
    for f in learner.fragments():
        digest.update(f"{f.name} {f.kind} {f.dtype} {f.offset} {f.data.size}".encode())
        digest.update(f.data.data)
    return digest.hexdigest()


def state_of(learner: Learner) -> dict[tuple[str, str], np.ndarray]:
    """The whole training state, gathered from all ranks."""
    mine = [(f.name, f.kind, f.shape, f.offset, f.data.copy()) for f in learner.fragments()]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    state: dict[tuple[str, str], np.ndarray] = {}
    for name, kind, shape, offset, data in (item for part in everything for item in part):
        whole = state.setdefault((name, kind), np.zeros(int(np.prod(shape)), data.dtype))
        whole[offset : offset + len(data)] = data
    return state


class Fragments:
    """A reader over gathered state."""

    def __init__(self, state: dict[tuple[str, str], np.ndarray]) -> None:
        self.state = state

    def read(self, name: str, kind: str, offset: int, length: int) -> np.ndarray:
        """What `CheckpointReader.read` gives."""
        return self.state[name, kind][offset : offset + length].copy()


def with_filled_adapters(state: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """The state with every lora_B filled: with zeros, as an adapter begins, lora_A would get no gradient."""
    generator = np.random.default_rng(0)
    for name, kind in sorted(state):
        if kind == "param" and "lora_B" in name:
            state[name, kind][:] = 0.1 * generator.standard_normal(state[name, kind].shape)
    return state


def first_gradients(
    plan: RunPlan, folder: Path, start: dict[tuple[str, str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Gradients (flat) of the first step from a state, read from Adam's first moment after it: (1 - beta1) g.

    The plan's job must not clip.
    """
    assert plan.job.train.max_grad_norm == 0
    learner = learner_of(plan, folder)
    learner.load(Fragments(start), 0)  # type: ignore[arg-type]
    train_steps(learner, plan, folder, 1)
    state = state_of(learner)
    learner.close()
    decay = plan.job.train.adam_beta1
    return {name: data / (1 - decay) for (name, kind), data in state.items() if kind == "exp_avg"}


def reference_losses(
    plan: RunPlan, folder: Path, count: int, start: dict[str, np.ndarray] | None = None, name: str = "sft"
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain PyTorch loop over the same rows, one padded-free document at a time; also the first step's gradients.

    start: values (flat) of the trained parameters by name; without it the model's own (of a reward model it must be
    given). name: of the method in `METHODS`. The gradients are not clipped.
    """
    from rayft.learner.schedule import learning_rate

    torch.set_num_threads(1)  # of so small a model two threads mostly wait for each other
    train = plan.job.train
    model, reference = plain_model(plan, folder), plain_model(plan, folder)
    reference.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if start is not None:
        assert trained.keys() == start.keys()
        for name_, parameter in trained.items():
            parameter.data.copy_(torch.from_numpy(start[name_]).view_as(parameter))
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon
    )
    losses, gradients = [], {}
    for number, (corpus, step) in enumerate(step_plans(plan, folder, count)):
        loss = plain_loss(
            name, corpus, step, looks(model, corpus), looks(reference, corpus), scores_of(model, corpus)
        )
        loss.backward()
        if number == 0:
            gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, number, plan.total_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, gradients


def plain_model(plan: RunPlan, folder: Path) -> Any:
    """The job's model with its adapter, by transformers and PEFT alone, fp32."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rayft.model.adapters import add_adapter

    job = plan.job
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if job.method == "reward":
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder / "model", num_labels=job.reward.heads, **options
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    return add_adapter(model, job.adapter, job.seed, zero_stage=0).train()
