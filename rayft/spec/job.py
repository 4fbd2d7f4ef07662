"""The job file as a whole: its groups, and what contradicts itself between them.

Unknown keys are refused with a suggestion (`rayft.spec.load`); what contradicts itself inside one group is refused
there, between groups here, and what needs the model or the cluster to judge where that is known.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayft.spec.groups import (
    Adapter,
    Checkpoint,
    Cluster,
    Data,
    Dpo,
    Group,
    Log,
    Model,
    Reward,
    Train,
    Zero,
)
from rayft.spec.measure import Eval
from rayft.spec.rl import METHODS, Place, Placement, RewardSource, Rl, Rollout
from rayft.spec.search import check_search
from rayft.spec.tune import Tune

#: A run's name is a folder of the storage and part of a submission's: no separator, and no `.` or `-` at either end.
RUN_NAME = r"[a-z0-9]([-a-z0-9_.]{0,61}[a-z0-9])?"


class Job(Group):
    """A whole job file."""

    name: Annotated[str, Field(pattern=f"^{RUN_NAME}$")] = Field(
        description="Run name; the same name resumes."
    )
    method: Literal[
        "sft", "reward", "dpo", "ppo", "grpo", "rloo", "reinforce++", "dapo", "dr_grpo", "gspo"
    ] = Field(
        "sft",
        description="sft: imitate answers; reward: learn to score them; dpo: learn from preferences; the others: "
        "reinforcement learning from rewards of the model's own answers, each with its defaults of the group `rl`.",
    )
    storage: str = Field("runs", description="Folder or s3:// prefix under which the run folder lives.")
    seed: int = Field(
        0, ge=0, description="Of everything that is drawn: weights, order of the rows, answers."
    )
    model: Model
    adapter: Adapter = Field(default_factory=Adapter)
    data: Data
    train: Train = Field(default_factory=Train)
    reward: Reward = Field(default_factory=Reward)
    dpo: Dpo = Field(default_factory=Dpo)
    rl: Rl = Field(default_factory=Rl)
    rollout: Rollout = Field(default_factory=Rollout)
    rewards: list[RewardSource] = Field(
        default_factory=list,
        description="What scores the model's answers; several are added up by their weights.",
    )
    placement: Placement = Field(default_factory=Placement)
    zero: Zero = Field(default_factory=Zero)
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Further DeepSpeed options, passed through."
    )
    cluster: Cluster = Field(default_factory=Cluster)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Eval = Field(default_factory=Eval)
    log: Log = Field(default_factory=Log)
    tune: Tune | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Makes the job a search, `rayft tune`: its other groups are what every trial has in common.",
    )

    @model_validator(mode="after")
    def _groups_agree(self) -> Job:
        if self.train.early_stopping_patience and not (self.data.eval and self.eval.every_steps):
            raise ValueError("train.early_stopping_patience needs data.eval and eval.every_steps")
        if self.eval.every_steps and not self.data.eval:
            raise ValueError("eval.every_steps needs data.eval, rows that are not trained on")
        self._reinforcement_agrees()
        for method in ("reward", "dpo"):
            group = getattr(self, method)
            if self.method != method and group != type(group)():
                raise ValueError(f"{method}: this group does nothing under method {self.method}")
        if self.method == "dpo" and self.dpo.loss == "kto" and self.train.global_batch_size == 1:
            raise ValueError(
                "dpo.loss kto needs train.global_batch_size 2 or more: it compares prompts with other rows' answers"
            )
        for suite in self.eval.suites if self.method == "reward" else ():
            if suite.type != "preference":
                raise ValueError(
                    f"eval.suites: {suite.name!r} of type {suite.type} needs a model that writes, and method reward makes "
                    "one that scores (use type preference)"
                )
        if self.method != "sft":
            if self.data.loss_on != "assistant":
                raise ValueError("data.loss_on is for method sft; preference methods look at the answers")
            if self.adapter.lora_dropout:
                raise ValueError(
                    f"adapter.lora_dropout must be 0 under method {self.method}: two passes over the same answer must agree"
                )
        if self.adapter.type == "qlora" and self.cluster.gpus_per_worker == 0:
            raise ValueError(
                "adapter.type qlora needs a GPU (cluster.gpus_per_worker) and bitsandbytes; use lora on CPU"
            )
        if self.data.packing is True and self.model.attention in ("sdpa", "eager"):
            raise ValueError(
                f"data.packing needs attention per document; model.attention {self.model.attention} mixes the documents"
                " of a pack (use auto or documents)"
            )
        if self.train.precision == "pure_bf16" and self.zero.offload_optimizer:
            raise ValueError(
                "zero.offload_optimizer keeps fp32 master weights; it contradicts train.precision pure_bf16"
            )
        if self.tune:
            check_search(self)
        return self

    @property
    def reinforced(self) -> bool:
        """Whether the method learns from rewards of the model's own answers."""
        return self.method in METHODS

    @property
    def reference(self) -> Literal["adapter", "group"] | None:
        """Where the log-probabilities of the policy's beginning come from: the policy with its adapter off, which is exactly that;
        a model of its own; None where nothing holds the policy to it."""
        if not self.reinforced or not self.rl.kl_coef:
            return None
        exact = self.adapter.type == "lora" and not self.adapter.modules_to_save
        return "adapter" if exact else "group"

    @property
    def critic_beginning(self) -> str | None:
        """Path of the reward model that the critic begins as, if it reads the policy's tokens; None for the policy itself."""
        if self.rl.critic_init == "policy":
            return None
        return next((source.path for source in self.rewards if source.type == "model"), None)

    @property
    def unit_answers(self) -> int:
        """Answers of a unit of generation: `rollout.unit_prompts` prompts with all of theirs."""
        return (self.rollout.unit_prompts or 1) * (self.rl.num_generations or 1)

    def _reinforcement_agrees(self) -> None:
        if not self.reinforced:
            for name, nothing in (
                ("rl", Rl()),
                ("rollout", Rollout()),
                ("rewards", []),
                ("placement", Placement()),
            ):
                if getattr(self, name) != nothing:
                    raise ValueError(f"{name}: this group does nothing under method {self.method}")
            if self.eval.answers > 1:
                raise ValueError(f"eval.answers does nothing under method {self.method}")
            return
        self.rl = self.rl.filled(self.method)
        if self.train.early_stopping_patience:
            raise ValueError(
                f"train.early_stopping_patience goes by a loss on data.eval; method {self.method} measures rewards there"
            )
        if not self.rewards:
            raise ValueError(
                f"method {self.method} needs `rewards`, a list of what scores the model's answers"
            )
        names = [source.name for source in self.rewards]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rewards are named {min(twice)!r}")
        answers = (self.train.global_batch_size or 1) * (self.rl.num_generations or 1)
        if self.rl.num_mini_batches > answers:
            raise ValueError(
                f"rl.num_mini_batches {self.rl.num_mini_batches} is more than the {answers} answers of a step"
            )
        if self.rollout.unit_prompts is None:
            fitting = min(32, -(-answers // 2)) // (self.rl.num_generations or 1)
            self.rollout = self.rollout.model_copy(update={"unit_prompts": max(1, fitting)})
        rl = self.rl
        if rl.kl_target is not None and 0.2 * answers >= rl.kl_horizon:
            raise ValueError(
                f"rl.kl_horizon {rl.kl_horizon} is too short for steps of {answers} answers: rl.kl_coef could fall to 0 at once"
            )
        if rl.overlong_buffer and rl.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"rl.overlong_buffer {rl.overlong_buffer} is more than rollout.max_new_tokens {self.rollout.max_new_tokens}"
            )
        if self.train.max_steps and rl.critic_warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"rl.critic_warmup_steps {rl.critic_warmup_steps} leaves none of the {self.train.max_steps} steps to the policy"
            )
        if self.rollout.engine == "vllm" and (self.adapter.modules_to_save or self.adapter.use_dora):
            raise ValueError("rollout.engine vllm takes plain LoRA: no adapter.modules_to_save, no use_dora")
        if self.rollout.engine == "vllm" and self.adapter.type == "lora" and self.adapter.lora_r > 512:
            raise ValueError(
                f"rollout.engine vllm takes adapters up to adapter.lora_r 512, not {self.adapter.lora_r}"
            )
        if self.eval.answers > 1 and not self.data.eval:
            raise ValueError("eval.answers needs data.eval, the prompts to be answered so often")
        self._placement_agrees()
        if self.adapter.type == "qlora":
            raise ValueError(f"adapter.type qlora is not there yet for method {self.method}; use lora")
        if self.checkpoint.on_failure == "continue":
            raise ValueError(f"checkpoint.on_failure continue is not there yet for method {self.method}")
        if self.data.too_long == "truncate":
            raise ValueError("data.too_long truncate would cut questions; use drop or error")
        for source in self.data.train:
            if source.format != "auto":
                raise ValueError(
                    f"data.train: format {source.format} is for given answers; rows with `prompt` need none"
                )
        if self.train.tokens_per_step:
            raise ValueError(
                "train.tokens_per_step is for rows that are there before; use global_batch_size, prompts of a step"
            )
        if not any(source.weight for source in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing would be learned")
        if self.rollout.max_new_tokens >= self.data.max_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} leaves no room for a prompt in data.max_length "
                f"{self.data.max_length}"
            )
        if isinstance(self.cluster.num_workers, tuple):
            raise ValueError(
                f"cluster.num_workers [min, max] is not for method {self.method}; give one number"
            )

    def _placement_agrees(self) -> None:
        rl, placement = self.rl, self.placement
        if placement.critic != Place() and not rl.critic:
            raise ValueError(
                f"placement.critic: the advantage estimator {rl.advantage_estimator} has no critic"
            )
        if placement.reference != Place() and not rl.kl_coef:
            raise ValueError("placement.reference: without rl.kl_coef there is no reference")
        if placement.reference != Place() and self.reference == "adapter":
            raise ValueError(
                "placement.reference: the reference is the policy with its adapter off, which has no processes of its own"
            )
        if placement.rollout != Place() and not self.rollout.engines:
            raise ValueError(
                "placement.rollout: without rollout.engines answers are drawn inside the policy's processes"
            )
        ranks, given = self.cluster.max_workers, 0.0
        models = sum(source.workers for source in self.rewards if source.type == "model")
        # Processes in the fullest bundle of a rank.
        beside = {"rollout": -(-self.rollout.engines // ranks), "rewards": -(-models // ranks)}
        for name, place in placement:
            if place.apart and name == "critic" and (place.gpus is not None or place.cpus != 1):
                raise ValueError("placement.critic: apart it has what a rank of the policy has (cluster)")
            if not place.apart and place.cpus != 1:
                raise ValueError(f"placement.{name}.cpus is for bundles of their own; set apart to true")
            if not place.apart and place.gpus and not self.cluster.gpus_per_worker:
                raise ValueError(
                    f"placement.{name}.gpus is a part of a rank's GPU, and cluster.gpus_per_worker is 0"
                )
            if name == "rewards" and place.gpus and not models:
                raise ValueError(
                    "placement.rewards.gpus is for rewards that are models; a function or an endpoint takes none"
                )
            if (place.gpus or 0) > 1:
                raise ValueError(f"placement.{name}.gpus {place.gpus:g}: a process computes on one GPU")
            given += 0.0 if place.apart else beside.get(name, 1) * (place.gpus or 0.0)
        if given and given >= self.cluster.gpus_per_worker:
            raise ValueError(
                f"placement: the roles beside the policy ask for {given:g} GPUs a rank, and of cluster.gpus_per_worker "
                f"{self.cluster.gpus_per_worker:g} something must be left to the policy"
            )
