"""The groups that every method shares. Each key, its unit and its default stand here (or in `rayft.spec.rl`) only.

Unknown keys are refused with a suggestion (`rayft.spec.load`); what contradicts itself inside one group is
refused here, what needs the model or the cluster to judge is refused where that is known.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Model(Group):
    """Which model, and how its weights are held."""

    path: str = Field(
        description="Hub id, local folder, s3:// prefix, GGUF file, or `package:NAME` for a GGUF inside an installed Python package."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    gguf_file: str | None = Field(
        None, description="Name of the GGUF file inside the folder or hub repository."
    )
    tokenizer: str | None = Field(None, description="Where the tokenizer comes from, if not from the model.")
    chat_template: str | None = Field(
        None,
        description="A Jinja file, local or s3://, that replaces the tokenizer's chat template; saved with the model.",
    )
    random_weights: bool = Field(
        False, description="Build the model from its config alone with random weights (tests and benchmarks)."
    )
    attention: Literal["auto", "documents", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="`documents`: rayft's per-document attention, needed for packing; auto picks it for proven families.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a model.")


class Adapter(Group):
    """LoRA and its variants; `type: none` is full fine-tuning."""

    type: Literal["none", "lora", "qlora"] = Field(
        "none", description="qlora: LoRA on a base model held in 4 bits; needs a GPU."
    )
    lora_r: PositiveInt = Field(16, description="Rank.")
    lora_alpha: PositiveFloat = Field(
        32.0, description="The adapter's output is multiplied by lora_alpha / lora_r."
    )
    lora_dropout: Fraction = Field(
        0.0, description="Share of the adapter's inputs left out in training (sft alone)."
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of the layers that are adapted; all-linear: all but the head."
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules trained in full beside the adapter and saved with it."
    )
    use_rslora: bool = Field(
        False, description="Scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)."
    )
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv:2402.09353).")

    @model_validator(mode="after")
    def _type_is_said(self) -> Adapter:
        given = self.model_fields_set
        if given and "type" not in given:
            raise ValueError(
                f"adapter: {min(given)} does nothing without `type: lora` (or qlora; none for full)"
            )
        return self


class Source(Group):
    """One source of rows."""

    path: str = Field(
        description="File (jsonl, json, parquet, csv), folder, s3:// object or prefix, or hub id."
    )
    split: str = Field("train", description="Split of a hub data set.")
    name: str | None = Field(None, description="Configuration name of a hub data set.")
    format: Literal[
        "auto",
        "text",
        "messages",
        "prompt_completion",
        "alpaca",
        "sharegpt",
        "preference",
        "ranked",
        "labelled",
    ] = Field(
        "auto",
        description="Column layout; auto goes by the columns and refuses what is ambiguous. `preference` (prompt, chosen, "
        "rejected), `ranked` (prompt, completions, best first) and `labelled` (prompt, completion, label) are for the "
        "methods reward and dpo.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames, field of rayft: column of the source."
    )
    system: str | None = Field(None, description="System message put before conversations that have none.")
    weight: PositiveFloat | None = Field(
        None, description="Share of the rows of each step; give it for all sources or none."
    )
    limit: PositiveInt | None = Field(None, description="Use only the first so many rows.")
    replay: bool = Field(
        False, description="General data mixed in against forgetting; does not count for epochs."
    )


class Data(Group):
    """What is trained on and how rows become batches."""

    train: list[Source] = Field(min_length=1)
    eval: list[Source] = Field(
        default_factory=list,
        description="Held-out rows: for the evaluation loss; for methods that learn from rewards, prompts whose answers are scored.",
    )
    max_length: PositiveInt = Field(
        2048,
        description="Tokens; longer rows are treated as `too_long` says. Also the length of a pack. Methods that learn from rewards: "
        "of prompt and answer together, so a prompt may have max_length - rollout.max_new_tokens.",
    )
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="truncate: conversations lose their end, compared answers the beginning of their prompt; error: end the run.",
    )
    packing: bool | Literal["auto"] = Field(
        "auto", description="Best-fit packing; auto packs where the model family is proven for it."
    )
    loss_on: Literal["assistant", "completion", "all"] = Field(
        "assistant",
        description="Which tokens carry loss under `method: sft` (`text` rows always train on all).",
    )
    contradictions: Literal["error", "keep"] = Field(
        "error",
        description="What to do with rows of data.train that rate the same answers to the same prompt both ways (reward, dpo).",
    )
    shard_rows: PositiveInt = Field(2000, description="Rows per shard of the tokenised cache.")
    cache: str | None = Field(
        None,
        description="Where the tokenised cache lives (default: `cache/` beside the runs); shared by ranks, restarts and searches.",
    )

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> Data:
        weighted = [s.weight is not None for s in self.train]
        if any(weighted) and not all(weighted):
            missing = self.train[weighted.index(False)].path
            raise ValueError(
                f"data.train: give `weight` for every source or for none (missing for {missing!r})"
            )
        if any(s.replay for s in self.train):
            if all(s.replay for s in self.train):
                raise ValueError("data.train: at least one source must not be `replay`")
            if not all(weighted):
                raise ValueError("data.train: a `replay` source needs a `weight` on every source")
        return self


class Train(Group):
    """Optimisation."""

    global_batch_size: PositiveInt | None = Field(
        None,
        description="Rows per optimizer step over all ranks (default 16 if tokens_per_step is not given). Methods that learn from "
        "rewards: prompts of a step, each with rl.num_generations answers.",
    )
    tokens_per_step: PositiveInt | None = Field(
        None,
        description="Instead of global_batch_size: tokens per optimizer step over all ranks. Epochs of such steps can "
        "only be counted when all rows are tokenised, so training waits for that unless max_steps is given.",
    )
    micro_batch_size: PositiveInt = Field(
        1,
        description="Rows (unpacked) or packs of data.max_length tokens (packed) per forward pass of a rank.",
    )
    num_train_epochs: PositiveFloat = Field(1.0, description="Passes over data.train.")
    max_steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps; overrides num_train_epochs. Methods that learn from rewards: rounds of drawing answers and "
        "training on them, each of rl.num_epochs x rl.num_mini_batches optimizer steps.",
    )
    learning_rate: PositiveFloat = Field(1e-5, description="Of AdamW, at its highest.")
    lr_scheduler: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="wsd: warm-up, stable, linear decay over the last `decay_ratio`."
    )
    warmup_ratio: Fraction = Field(
        0.03, description="Share of the run over which the learning rate rises from 0."
    )
    warmup_steps: int | None = Field(None, ge=0, description="Overrides warmup_ratio.")
    min_lr_ratio: Fraction = Field(
        0.0, description="Learning rate at the end as a fraction of learning_rate."
    )
    decay_ratio: Fraction = Field(0.2, description="wsd: share of the run over which it falls.")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Not applied to biases, norms and other 1-D parameters."
    )
    adam_beta1: Fraction = Field(0.9, description="AdamW: decay of the mean of the gradients.")
    adam_beta2: Fraction = Field(0.999, description="AdamW: decay of the mean of their squares.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="AdamW: added to the root of the latter.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="0 switches clipping off.")
    precision: Literal["bf16", "fp32", "pure_bf16"] = Field(
        "bf16",
        description="bf16: bf16 compute, fp32 master weights and optimizer state; pure_bf16: no master copy.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, slower.",
    )
    logits_chunk: PositiveInt = Field(
        1024, description="Trained tokens per chunk of the lm-head, so that the logits never exist whole."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Evaluations without improvement of the evaluation loss before the run ends."
    )
    early_stopping_threshold: NonNegativeFloat = Field(
        0.0, description="How much lower than the best so far the evaluation loss must be to count as better."
    )
    max_loss: PositiveFloat | None = Field(
        None, description="End the run as diverged (code 6) when the training loss exceeds this."
    )

    @model_validator(mode="after")
    def _one_batch_unit(self) -> Train:
        if self.global_batch_size and self.tokens_per_step:
            raise ValueError("train: give global_batch_size or tokens_per_step, not both")
        if not self.global_batch_size and not self.tokens_per_step:
            self.global_batch_size = 16
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Train:
        if self.warmup_steps and self.max_steps and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"train: warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}"
            )
        if (
            self.lr_scheduler == "wsd"
            and self.warmup_steps is None
            and self.warmup_ratio + self.decay_ratio > 1
        ):
            raise ValueError("train: warmup_ratio and decay_ratio together are more than the whole run")
        return self


class Reward(Group):
    """`method: reward`: a model that scores answers, learned from comparisons (Bradley-Terry, Plackett-Luce) or labels."""

    heads: PositiveInt = Field(
        1,
        description="Score heads of different beginnings on one body: the score is their mean, their spread says how sure it is.",
    )
    center_coef: NonNegativeFloat = Field(
        0.01,
        description="Weight of the square of the scores' mean in a row, which keeps scores around 0 (arXiv:2312.09244).",
    )


#: `dpo.beta` where the job gives none.
DEFAULT_BETA = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


class Dpo(Group):
    """`method: dpo`: direct preference objectives. rayft.objectives.preference and .kto give the formulas."""

    loss: Literal["sigmoid", "ipo", "simpo", "orpo", "kto"] = Field(
        "sigmoid",
        description="sigmoid: DPO (arXiv:2305.18290), conservative with label_smoothing; ipo: arXiv:2310.12036; simpo: "
        "arXiv:2405.14734 and orpo: arXiv:2403.07691, without a reference; kto: arXiv:2402.01306, for `labelled` rows.",
    )
    beta: PositiveFloat | None = Field(
        None, description=f"Strength of the objective (default: {DEFAULT_BETA})."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="Share of pairs taken to be the wrong way round (conservative DPO); sigmoid and simpo.",
    )
    length_normalized: bool = Field(
        False,
        description="sigmoid: log-probabilities per token instead of summed (ipo, simpo and orpo always do).",
    )
    simpo_gamma: NonNegativeFloat = Field(1.0, description="simpo: the margin that is aimed at.")
    nll_coef: NonNegativeFloat = Field(
        0.0,
        description="Weight of the chosen answers' negative log-likelihood per token; orpo always adds it with weight 1.",
    )
    nll_on: Literal["completion", "all"] = Field(
        "completion",
        description="Tokens of the chosen side that count for it: the answer, or the prompt too.",
    )
    desirable_weight: PositiveFloat = Field(1.0, description="kto: weight of good answers.")
    undesirable_weight: PositiveFloat = Field(1.0, description="kto: weight of bad answers.")

    @model_validator(mode="after")
    def _fits_the_loss(self) -> Dpo:
        only = {
            "label_smoothing": ("sigmoid", "simpo"),
            "length_normalized": ("sigmoid",),
            "simpo_gamma": ("simpo",),
            "nll_coef": ("sigmoid", "ipo", "simpo"),
            "nll_on": ("sigmoid", "ipo", "simpo", "orpo"),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
        }
        for key in sorted(self.model_fields_set & only.keys()):
            if self.loss not in only[key] and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"dpo.{key} is for dpo.loss {' or '.join(only[key])}, not {self.loss}")
        return self

    @property
    def strength(self) -> float:
        """beta, the job's or the loss's default."""
        return self.beta or DEFAULT_BETA[self.loss]

    @property
    def needs_reference(self) -> bool:
        return self.loss in ("sigmoid", "ipo", "kto")


class Zero(Group):
    """DeepSpeed ZeRO."""

    stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto", description="auto: the lowest stage that fits by the memory plan."
    )
    offload_optimizer: bool = Field(False, description="Optimizer state and step in host memory.")

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> Zero:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("zero: offload_optimizer needs stage 1, 2 or 3 (or auto)")
        return self


class Cluster(Group):
    """What the run needs of the cluster."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="Ranks; [min, max] makes the run elastic."
    )
    gpus_per_worker: NonNegativeFloat = Field(
        0,
        description="0 trains on CPU; 1: a GPU for each rank; less: a part of one, the rest being for other runs or roles.",
    )
    cpus_per_worker: PositiveFloat = Field(1, description="CPUs that Ray keeps for a rank.")
    threads_per_worker: PositiveInt | None = Field(
        None,
        description="CPU threads of a rank (default: cpus_per_worker); fixed, because results depend on it.",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="Worker failures that are restarted from the last checkpoint. Where rewards are learned from, each role that holds "
        "nothing of its own (rollout, reward, reference) may besides be started again as often in the middle of a step.",
    )
    hang_timeout_s: PositiveFloat = Field(
        600.0,
        description="Seconds without progress of a rank before stacks are dumped and the group restarted. Methods that learn from "
        "rewards: seconds that a process may be at one piece of a step (a sync, a piece of generation, log-probabilities, an update).",
    )
    start_timeout_s: PositiveFloat = Field(300.0, description="Seconds to wait for the workers to start.")
    wait_s: NonNegativeFloat = Field(
        600.0,
        description="Seconds to wait for nodes in the place of those that were lost or taken away, before the run ends, resumable.",
    )
    elastic_interval_s: PositiveFloat = Field(
        60.0, description="Seconds between looks at whether an elastic run can grow."
    )
    preflight: bool = Field(
        False,
        description="Look at every node before the run starts, as `rayft preflight` does; name the bad ones and end (4 or 5).",
    )
    gpu: str | None = Field(
        None, description="GPU type for the memory plan, such as H100-80GB; default: what the node reports."
    )

    @field_validator("num_workers")
    @classmethod
    def _min_below_max(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[min, max] has min {value[0]} > max {value[1]}")
        return value

    @model_validator(mode="after")
    def _a_gpu_for_each(self) -> Cluster:
        if self.gpus_per_worker > 1:
            raise ValueError(
                f"cluster.gpus_per_worker {self.gpus_per_worker:g}: a worker computes on one GPU; ask for more workers (num_workers)"
            )
        if 0 < self.gpus_per_worker <= 0.5 and self.max_workers > 1:
            raise ValueError(
                f"cluster.gpus_per_worker {self.gpus_per_worker:g} lets two workers come to lie on one GPU, between which NCCL makes no "
                "connection; give more than 0.5, or one worker"
            )
        return self

    @property
    def min_workers(self) -> int:
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def threads(self) -> int:
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))


class Checkpoint(Group):
    """When the state of a run is kept, and how."""

    every_steps: PositiveInt | None = Field(
        None, description="Steps between checkpoints (default: a tenth of the run, at most 500)."
    )
    keep: PositiveInt = Field(2, description="Committed checkpoints that are kept.")
    backlog: PositiveInt = Field(1, description="Checkpoints that may be uploading while training goes on.")
    commit_timeout_s: PositiveFloat = Field(
        600.0, description="Seconds rank 0 waits for all fragments before a checkpoint counts as failed."
    )
    on_failure: Literal["stop", "continue"] = Field(
        "stop", description="What a checkpoint that storage refuses does to the run."
    )
    fork_from: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="RUN_FOLDER@STEP: a run without a checkpoint of its own begins from that one of another run (weights, "
        "optimizer, place in the data), with this job's settings. Model, method, adapter, rows and seed must be the same.",
    )

    @field_validator("fork_from")
    @classmethod
    def _names_run_and_step(cls, value: str | None) -> str | None:
        run, _, step = (value or "").rpartition("@")
        if value is not None and not (run and step.isascii() and step.isdigit() and int(step) > 0):
            raise ValueError(
                f"checkpoint.fork_from {value!r} is not of the form RUN_FOLDER@STEP (such as runs/mine@40)"
            )
        return value

    @property
    def fork(self) -> tuple[str, int] | None:
        """Folder of the run that this one begins from, and the step; None where it begins from the model."""
        if self.fork_from is None:
            return None
        run, _, step = self.fork_from.rpartition("@")
        return run, int(step)


class Log(Group):
    """What is told while a run goes on, and to whom."""

    every_steps: PositiveInt = Field(
        1, description="Steps between progress lines; the run log has every step."
    )
    tensorboard: bool = Field(False, description="Write event files into the run folder.")
    mlflow: str | None = Field(None, description="Tracking URI.")
    wandb: str | None = Field(None, description="Project.")
    group: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="What runs that belong together have in common, in W&B its group, in MLflow a parent run; a search gives its name.",
    )
    hparams: dict[str, Any] = Field(
        default_factory=dict,
        exclude_if=lambda value: not value,
        description="Keys and values by which such runs differ, for TensorBoard's HParams; a search gives its trials'.",
    )
