"""Groups of the methods that learn from rewards: the algorithm, the rollouts, what scores them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rayft.spec.groups import Fraction, Group, NonNegativeFloat

#: Method -> what it sets in the group `rl` where the job says nothing. rayft.objectives has formulas and papers.
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {
        "num_generations": 1,
        "advantage_estimator": "gae",
        "whiten_advantages": True,
        "loss_aggregation": "token_mean",
        "kl_coef": 0.05,
        "kl_in": "reward",
        "kl_estimator": "k1",
        "num_epochs": 4,
    },
    "grpo": {"advantage_scale": "group", "loss_aggregation": "sequence_mean", "kl_coef": 0.04},
    "rloo": {
        "advantage_estimator": "leave_one_out",
        "ratio": "sequence",
        "loss_aggregation": "sequence_mean",
        "kl_coef": 0.05,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    "reinforce++": {
        "num_generations": 1,
        "advantage_estimator": "returns",
        "whiten_advantages": True,
        "loss_aggregation": "token_mean",
        "kl_coef": 0.01,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    "dapo": {
        "advantage_scale": "group",
        "loss_aggregation": "token_mean",
        "clip_high": 0.28,
        "drop_uniform_groups": True,
        "kl_coef": 0.0,
    },
    "dr_grpo": {"advantage_scale": "none", "loss_aggregation": "constant", "kl_coef": 0.0},
    "gspo": {
        "advantage_scale": "group",
        "ratio": "sequence_mean",
        "loss_aggregation": "sequence_mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
    },
}

#: What holds for every method that says nothing else.
DEFAULTS: dict[str, Any] = {
    "num_generations": 8,
    "advantage_estimator": "group",
    "advantage_scale": "group",
    "whiten_advantages": False,
    "loss_aggregation": "token_mean",
    "ratio": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_coef": 0.0,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "num_epochs": 1,
    "drop_uniform_groups": False,
}


class Rl(Group):
    """The algorithm. What is not given is the method's own choice."""

    num_generations: PositiveInt | None = Field(None, description="Answers to each prompt of a step.")
    num_epochs: PositiveInt | None = Field(None, description="How often a step's answers are trained on.")
    num_mini_batches: PositiveInt = Field(
        1, description="Optimizer updates of an epoch over a step's answers."
    )
    advantage_estimator: Literal["gae", "group", "leave_one_out", "returns"] | None = Field(
        None,
        description="gae: with a critic; group: against the mean of the prompt's answers; leave_one_out: of its others; "
        "returns: the rewards as they are.",
    )
    advantage_scale: Literal["group", "batch", "none"] | None = Field(
        None,
        description="For the estimator group: scores are divided by the standard deviation of the prompt's answers (group), of all "
        "answers of the step (batch), or not at all (none).",
    )
    whiten_advantages: bool | None = Field(
        None, description="Scale the step's advantages to mean 0, deviation 1."
    )
    gamma: Fraction = Field(1.0, description="Discount of a reward for each token that it comes later.")
    gae_lambda: Fraction = Field(
        0.95,
        description="gae: how far ahead a token's advantage looks, 1 / (1 - gae_lambda) tokens or so (arXiv:1506.02438); 1: up to the end "
        "of the answer, 0: one token, the rest being the critic's word.",
    )
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = Field(
        None,
        description="token_mean: each token of the step counts the same; sequence_mean: each answer; constant: tokens are summed and "
        "divided by answers x rollout.max_new_tokens, whatever the lengths.",
    )
    ratio: Literal["token", "sequence", "sequence_mean"] | None = Field(
        None,
        description="Whose probability is divided by that under the old policy: a token's, an answer's (the product over its tokens: "
        "sequence; their geometric mean, as in GSPO: sequence_mean).",
    )
    clip_low: PositiveFloat | None = Field(
        None, description="The ratio gets no gradient further down than 1 - clip_low (bad answers)."
    )
    clip_high: PositiveFloat | None = Field(
        None, description="The ratio gets no gradient further up than 1 + clip_high (good answers)."
    )
    clip_dual: PositiveFloat | None = Field(
        None, gt=1, description="Bound of the loss of tokens with negative advantage (arXiv:1912.09729)."
    )
    importance_cap: Annotated[float, Field(ge=1)] = Field(
        2.0, description="Bound of the weight that corrects for the engine's difference from the trainer."
    )
    kl_coef: NonNegativeFloat | None = Field(
        None, description="Weight of the divergence from the reference; 0 does without a reference."
    )
    kl_in: Literal["reward", "loss"] | None = Field(
        None,
        description="Where the divergence counts: taken off the rewards, token by token, or added to the loss.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = Field(
        None,
        description="Of d = log p - log p_reference of a token: k1: d; k2: d^2 / 2; k3: exp(-d) - 1 + d.",
    )
    kl_weighted: bool | None = Field(
        None,
        description="In the loss: weight the estimate with the ratio to the old policy, which k1 and k3 need for the "
        "right gradient (default: for those).",
    )
    kl_target: PositiveFloat | None = Field(
        None, description="Nats an answer; kl_coef is moved towards what keeps the divergence there."
    )
    kl_horizon: PositiveInt = Field(
        10_000,
        description="kl_target: answers over which kl_coef changes by a fifth at most. A run of fewer answers than that hardly moves it.",
    )
    value_clip: PositiveFloat | None = Field(
        0.2,
        description="gae: the critic gets no gradient from values further than this from those at the time of the rollout, in units of "
        "reward; null: no bound.",
    )
    critic_learning_rate: PositiveFloat | None = Field(
        None, description="gae (default: train.learning_rate)."
    )
    critic_init: Literal["reward", "policy"] = Field(
        "reward",
        description="gae: what the critic begins as. reward: the first reward model, where it reads the policy's tokens; policy: the "
        "policy with a new head that says 0, for reward models that judge unfinished answers far off, and what is taken where the reward "
        "model reads other tokens, has an adapter or several heads.",
    )
    critic_warmup_steps: int = Field(0, ge=0, description="gae: first steps in which only the critic learns.")
    truncated: Literal["score", "penalty", "mask"] = Field(
        "score",
        description="Answers cut off at rollout.max_new_tokens: scored like others, given truncated_penalty, or left out "
        "of the loss.",
    )
    truncated_penalty: float = Field(-1.0, description="truncated penalty: the score of such an answer.")
    overlong_buffer: PositiveInt | None = Field(
        None,
        description="The last so many tokens before max_new_tokens cost, one after the other, up to 1 of an answer's score (DAPO). "
        "Scores of held-out answers are without it.",
    )
    drop_uniform_groups: bool | None = Field(
        None, description="Leave out prompts whose answers all score the same and draw others instead (DAPO)."
    )
    max_refills: PositiveInt = Field(
        10,
        description="drop_uniform_groups: how often others are drawn before a step goes on with what it has.",
    )

    def filled(self, method: str) -> Rl:
        """The group with the method's choice for what was not given. Raises ValueError for what contradicts itself."""
        choices = {**DEFAULTS, **METHODS[method]}
        values = {name: choices[name] for name in choices if getattr(self, name) is None}
        made = self.model_copy(update=values)
        if made.advantage_estimator != "group" and self.advantage_scale is None:
            made.advantage_scale = None
        if not made.kl_coef:
            own = {**choices, "kl_weighted": _kl_weighted(choices["kl_in"], choices["kl_estimator"])}
            for name in ("kl_in", "kl_estimator", "kl_weighted"):
                if getattr(self, name) not in (None, own[name]):
                    raise ValueError(f"rl.{name} does nothing while rl.kl_coef is 0")
        if made.kl_weighted is None:
            made.kl_weighted = _kl_weighted(made.kl_in, made.kl_estimator)
        made._refuse_contradictions()
        return made

    @property
    def critic(self) -> bool:
        """Whether the method has one."""
        return self.advantage_estimator == "gae"

    @property
    def grouped(self) -> bool:
        """Whether answers to one prompt are compared with each other."""
        return self.advantage_estimator in ("group", "leave_one_out")

    def _refuse_contradictions(self) -> None:
        if self.grouped and self.num_generations == 1:
            raise ValueError(
                f"rl.num_generations 1: the advantage estimator {self.advantage_estimator} compares the answers to one prompt, so "
                "it needs 2 or more"
            )
        if self.drop_uniform_groups and not self.grouped:
            raise ValueError(
                f"rl.drop_uniform_groups does nothing under the advantage estimator {self.advantage_estimator}"
            )
        if self.ratio != "token" and self.loss_aggregation != "sequence_mean":
            raise ValueError(
                f"rl.ratio {self.ratio} makes one loss an answer; with rl.loss_aggregation {self.loss_aggregation} long answers "
                "would count more (use sequence_mean)"
            )
        if self.kl_in == "loss" and self.kl_coef:
            if self.kl_estimator == "k1" and not self.kl_weighted:
                raise ValueError(
                    "rl.kl_estimator k1 in the loss without rl.kl_weighted: its gradient is 0 on average, so nothing would "
                    "hold the policy back"
                )
            if self.kl_estimator == "k2" and self.kl_weighted:
                raise ValueError(
                    "rl.kl_weighted with rl.kl_estimator k2: unweighted it has the right gradient, weighted it does not"
                )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("rl.kl_target moves rl.kl_coef, which must not be 0 for that")
        if self.ratio != "token" and not self.grouped:
            raise ValueError(
                f"rl.ratio {self.ratio} is for one advantage an answer; under {self.advantage_estimator} every token has its own"
            )
        if self.kl_in == "reward" and self.kl_coef:
            if self.kl_estimator != "k1":
                raise ValueError(
                    f"rl.kl_estimator {self.kl_estimator} in the reward: only k1 gives the divergence's gradient there"
                )
            if self.kl_weighted:
                raise ValueError("rl.kl_weighted is for rl.kl_in loss; rewards are not weighted")
        if (self.clip_low or 0) >= 1:
            raise ValueError(f"rl.clip_low {self.clip_low} lets ratios fall to 0 and below; give less than 1")
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default}
        for name in (
            "critic_init",
            "critic_learning_rate",
            "critic_warmup_steps",
            "gae_lambda",
            "value_clip",
        ):
            if name in given and not self.critic:
                raise ValueError(
                    f"rl.{name} is for the advantage estimator gae, not {self.advantage_estimator}"
                )
        if "advantage_scale" in given and self.advantage_estimator != "group":
            raise ValueError(
                f"rl.advantage_scale is for the advantage estimator group, not {self.advantage_estimator}"
            )
        for name, needed in (("kl_horizon", "kl_target"), ("max_refills", "drop_uniform_groups")):
            if name in given and not getattr(self, needed):
                raise ValueError(f"rl.{name} does nothing without rl.{needed}")
        if "gamma" in given and self.grouped:
            raise ValueError(
                f"rl.gamma is for rewards of tokens; {self.advantage_estimator} has one an answer"
            )
        if "truncated_penalty" in given and self.truncated != "penalty":
            raise ValueError("rl.truncated_penalty needs rl.truncated penalty")


def _kl_weighted(kl_in: str | None, estimator: str | None) -> bool:
    return kl_in == "loss" and estimator != "k2"


#: Arguments of `vllm.LLM` that rayft sets, and what to do instead.
OF_VLLM = {
    "model": "use model.path",
    "tokenizer": "use model.tokenizer",
    "dtype": "use train.precision",
    "max_model_len": "use data.max_length",
    "max_num_seqs": "use rollout.batch_size",
    "seed": "use the job's seed",
    "enable_lora": "use adapter.type",
    "max_lora_rank": "use adapter.lora_r",
    "max_loras": "there is one adapter",
    "tensor_parallel_size": "an engine has one GPU, so use more rollout.engines",
    "pipeline_parallel_size": "an engine has one GPU, so use more rollout.engines",
    "data_parallel_size": "use more rollout.engines",
    "logprobs_mode": "probabilities must be those that the trainer computes",
    "worker_extension_cls": "new weights are taken in by it",
}


class Rollout(Group):
    """How answers are drawn."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What draws the answers; vllm needs engines, and the extra `vllm`."
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict, description="engine vllm: further arguments of `vllm.LLM`, passed through."
    )
    engines: int = Field(
        0,
        ge=0,
        description="Engines in processes of their own, which are sent the weights after every step; 0: inside the policy's own "
        "processes, on its own tensors (under ZeRO-3: on weights gathered while answers are drawn).",
    )
    lag: Literal[0, 1] = Field(
        0,
        description="1: the next step's answers are drawn while a step trains, by the weights before it; needs engines.",
    )
    max_new_tokens: PositiveInt = Field(
        128,
        description="Tokens at which an answer is cut off. What data.max_length has besides is for the prompt.",
    )
    temperature: PositiveFloat = Field(
        1.0,
        description="Logits are divided by it, by the engine and wherever the policy's probabilities are counted.",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Draw from the likeliest tokens that have so much probability together."
    )
    top_k: PositiveInt | None = Field(None, description="Draw from the so many likeliest tokens.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Texts that end an answer, beside the end of a turn; they stay in it.",
    )
    unit_prompts: PositiveInt | None = Field(
        None,
        description="Prompts that are handed to an engine as one piece of work, always the same ones, whoever does it (default: as "
        "many as make 32 answers, or half of a step's).",
    )
    batch_size: PositiveInt = Field(
        64,
        description="Answers of a piece of work that an engine has in one pass at most; vllm: its max_num_seqs.",
    )
    bucket_mb: PositiveFloat = Field(128.0, description="MB of weights that are gathered and sent at a time.")

    @property
    def bucket_bytes(self) -> int:
        """`bucket_mb` in bytes."""
        return int(self.bucket_mb * 1e6)

    @model_validator(mode="after")
    def _agrees(self) -> Rollout:
        if self.engine == "vllm":
            if not self.engines:
                raise ValueError(
                    "rollout.engine vllm needs rollout.engines 1 or more: it cannot work on the policy's own tensors"
                )
            if self.top_p < 1 or self.top_k is not None:
                raise ValueError(
                    "rollout.top_p and rollout.top_k are not for engine vllm: the probabilities it tells are those of what they "
                    "leave, and the trainer's are not"
                )
            if ours := sorted(OF_VLLM.keys() & self.vllm.keys()):
                raise ValueError(f"rollout.vllm.{ours[0]} contradicts what rayft sets: {OF_VLLM[ours[0]]}")
        elif self.vllm:
            raise ValueError("rollout.vllm is for engine vllm")
        if self.lag and not self.engines:
            raise ValueError(
                "rollout.lag 1 needs rollout.engines 1 or more: inside the policy's processes nothing can be drawn while "
                "they train"
            )
        return self


class Place(Group):
    """Where the processes of a role live."""

    apart: bool = Field(False, description="In bundles of their own; false: beside the policy's ranks.")
    cpus: PositiveFloat = Field(1, description="apart: CPUs of each process.")
    gpus: NonNegativeFloat | None = Field(
        None,
        description="GPUs of each process; beside the policy, its part of the rank's (default: all processes there share equally), "
        "apart by default one where the policy has any. Rewards that are no model take none.",
    )


class Placement(Group):
    """Where roles live, beside the policy's ranks (group `cluster`) or apart. A critic apart has what a rank of the policy has."""

    critic: Place = Field(default_factory=Place, description="As many processes as the policy has ranks.")
    reference: Place = Field(
        default_factory=Place,
        description="As many processes as the policy has ranks, each with a whole model. Under LoRA there are none: the policy with its "
        "adapter off is the reference.",
    )
    rollout: Place = Field(default_factory=Place, description="Each of rollout.engines.")
    rewards: Place = Field(default_factory=Place, description="Each process of each of rewards.")


class RewardSource(Group):
    """One source of rewards."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$")] = Field(
        description="What its scores are called in the log, in rollouts/ and in metrics."
    )
    type: Literal["function", "model", "http"] = Field(description="What kind of thing `path` is.")
    path: str = Field(
        description="function: `file.py:name` or `module:name`, called with prompts, completions and the other columns of the "
        "rows as lists; it returns a list of numbers. model: one made by `method: reward` (a run, folder or hub id). http: a URL "
        "that is sent the same as JSON and answers with a list under `scores`."
    )
    weight: float = Field(1.0, description="0: measured, and not learned from.")
    timeout_s: PositiveFloat = Field(
        300.0, description="Seconds that a step's scores may take; http: each request."
    )
    retries: int | None = Field(
        None, ge=0, description="http: how often a request that failed is made again (default: 3)."
    )
    batch_size: PositiveInt | None = Field(None, description="http: answers of a request (default: 64).")
    workers: PositiveInt = Field(
        1, description="model: processes that share a step's answers, each with a copy of the model."
    )

    @field_validator("path")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> RewardSource:
        if self.type == "function" and not all(part.strip() for part in self.path.rpartition(":")):
            raise ValueError(f"path {self.path!r} of a function is `file.py:name` or `module:name`")
        if self.type == "http" and not self.path.startswith(("http://", "https://")):
            raise ValueError(f"path {self.path!r} of type http is a URL that begins with http:// or https://")
        for name in ("retries", "batch_size"):
            if self.type != "http" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for type http")
        if self.type != "model" and self.workers > 1:
            raise ValueError(f"workers is for type model; a {self.type} has one process")
        return self
