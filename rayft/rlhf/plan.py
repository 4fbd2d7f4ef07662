"""Decide, once and before any actor starts, what the run is: models, ZeRO stage, packing, prompts, steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.data.template import ChatTokenizer
from rayft.errors import JobError
from rayft.model.adapter_info import adapter_folder
from rayft.model.families import can_pack
from rayft.model.files import ModelFiles, job_files, load_config, load_tokenizer, resolve_model
from rayft.rlhf.prompts import PromptSet
from rayft.rlhf.rewards import load_function
from rayft.spec import Job, parse_job
from rayft.storage import node_cache_dir
from rayft.train.prepare import decide_packing, decide_stage, with_absolute_paths
from rayft.train.setup import pad_id_of


@dataclass(frozen=True)
class RlPlan:
    """All a process needs to know.

    owner: identity of the driver in the lease. stage: ZeRO stage of policy and critic. packed: whether answers share a row.
    critic: the job of the critic's model, if there is one. reference: where the reference's log-probabilities come from.
    total_steps: optimizer steps (at most, where the prompts end at position `end`).
    """

    job: Job
    run_uri: str
    owner: dict[str, Any]
    stage: int
    packed: bool
    pad_id: int
    critic: Job | None
    reference: str | None
    total_steps: int
    end: int | None
    checkpoint_every: int

    @property
    def one_pass(self) -> bool:
        """Whether the policy before a step is that of the step's only update, whose own forward pass then says what it thought of the
        answers: nothing needs that before."""
        rl = self.job.rl
        early = rl.critic or (rl.kl_coef and rl.kl_in == "reward")
        return rl.num_epochs == 1 and rl.num_mini_batches == 1 and not early

    @property
    def shared(self) -> bool:
        """Whether the answers to a prompt have it once in a pack. On a GPU they have not: its kernel for packs does not know that."""
        several = (self.job.rl.num_generations or 1) > 1
        return self.packed and several and not self.job.cluster.gpus_per_worker

    @property
    def savers(self) -> int:
        """Ranks that write into a checkpoint: the policy's, then the critic's."""
        return self.job.cluster.max_workers * (2 if self.critic else 1)


@dataclass(frozen=True)
class RlPrepared:
    """plan: of the run. files: of the policy's model. prompts: what is asked. memory: the memory plan as fields of an event."""

    plan: RlPlan
    files: ModelFiles
    prompts: PromptSet
    memory: dict[str, Any]

    def origin(self) -> dict[str, Any]:
        """Hashes of what the run is made from, for `lineage.json`."""
        return {
            "model": {"source": self.files.source, "identity": self.files.identity},
            "data": {
                "identity": self.prompts.identity,
                "rows": self.prompts.rows,
                "sources": [source.path for source in self.plan.job.data.train],
            },
            "tokenizer_and_template": self.prompts.chat.identity,
        }


def prepare(job: Job, run_uri: str, owner: dict[str, Any], say: Callable[[str], None]) -> RlPrepared:
    """Resolve models and prompts, and fix every decision of the run."""
    job = with_absolute_paths(job)
    node_dir = node_cache_dir()
    files = job_files(job, node_dir)
    packed = decide_packing(job, load_config(files, job.model))
    stage, memory = decide_stage(job, files)
    tokenizer = load_tokenizer(files, job.model)
    prompts = PromptSet(
        job.data,
        ChatTokenizer(tokenizer),
        seed=job.seed,
        longest=job.data.max_length - job.rollout.max_new_tokens,
        node_dir=node_dir,
    )
    prompts.take(0, 1)  # refuses what no prompt fits into before anything starts
    for source in job.rewards:
        if source.type == "function":
            load_function(source.path)
    refuse_short_context(job, load_config(files, job.model))
    per_step = job.train.global_batch_size
    assert per_step is not None
    end = None if job.train.max_steps else math.ceil(job.train.num_train_epochs * prompts.order.epoch_rows())
    total = job.train.max_steps or math.ceil((end or 0) / per_step)
    plan = RlPlan(
        job=job,
        run_uri=run_uri,
        owner=owner,
        stage=stage,
        packed=packed,
        pad_id=pad_id_of(tokenizer),
        critic=critic_job(job, tokenizer, node_dir, say) if job.rl.critic else None,
        reference=job.reference,
        total_steps=total,
        end=end,
        checkpoint_every=job.checkpoint.every_steps or max(1, min(500, total // 10)),
    )
    return RlPrepared(plan, files, prompts, memory)


def refuse_short_context(job: Job, config: Any) -> None:
    """Raise JobError if prompt and answer may get longer than what the model takes."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and job.data.max_length > context:
        raise JobError(
            f"data.max_length {job.data.max_length} is more than the {context} tokens that {job.model.path} takes.",
            f"Set it to {context} or less.",
        )


def critic_job(job: Job, tokenizer: Any, node_dir: Path, say: Callable[[str], None]) -> Job:
    """The job of the critic's model: the first reward model's body and score head, else the policy's with a new head (`rl.critic_init`).

    It reads the policy's tokens, so a reward model with another vocabulary, with several heads or that cannot be packed does not do.
    """
    values = job.model_dump(
        exclude={"rl", "rollout", "rewards", "placement", "dpo", "eval", "tune"}, exclude_unset=True
    )
    values |= {"method": "reward"}
    path = job.critic_beginning
    if path is None:
        return parse_job(values)
    is_adapter = adapter_folder(path, node_dir) is not None
    reason = "it is an adapter" if is_adapter else _unfit(path, job, tokenizer, node_dir)
    if reason:
        say(f"critic: begins as the policy, not as the reward model {path}: {reason}")
        return parse_job(values)
    trusted = ("trust_remote_code",) if path == job.model.path else ()
    kept = {name: value for name, value in values["model"].items() if name in ("attention", *trusted)}
    return parse_job({**values, "model": {**kept, "path": path}})


def _unfit(path: str, job: Job, tokenizer: Any, node_dir: Path) -> str:
    """Why a reward model cannot be a critic's beginning, or nothing."""
    spec = job.model.model_copy(
        update={"path": path, "tokenizer": None, "chat_template": None, "gguf_file": None}
    )
    if path != job.model.path:
        # The job says of the policy's folder alone that its code may run, and which revision it is.
        spec = spec.model_copy(update={"trust_remote_code": False, "revision": None})
    files = resolve_model(spec, node_dir)
    config: Any = load_config(files, spec)
    if load_tokenizer(files, spec).get_vocab() != tokenizer.get_vocab():
        return "its vocabulary is another one"
    if len(config.id2label) != 1:
        return f"it has {len(config.id2label)} score heads"
    possible, why = can_pack(config)
    return "" if possible else why
