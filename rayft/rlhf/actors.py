"""What the processes of a run do: policy, critic and reference. Each method is one phase of a step, called on all ranks at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from rayft.checkpoint import CheckpointReader, CheckpointWriter, Fragment
from rayft.data.template import Sample
from rayft.generate.hf import TransformersEngine
from rayft.learner.learner import Learner, StepResult
from rayft.model.files import NewScore, job_files, load_tokenizer
from rayft.objectives.policy import Clip, PolicyObjective, token_tensors
from rayft.objectives.value import ValueObjective
from rayft.rlhf.engines import Answers, GatheredModel, draw_unit
from rayft.rlhf.experience import Columns
from rayft.rlhf.layout import MiniBatch
from rayft.rlhf.placement import Spot
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.rollout import Unit
from rayft.rlhf.weights import Shipped, ship
from rayft.spec import Job
from rayft.storage import node_cache_dir, open_store
from rayft.train import setup
from rayft.train.address import free_address
from rayft.train.evaluate import measure_suites
from rayft.train.retention import Retention

#: Seconds that ranks wait for each other in a collective, at least; the driver, who can restart them, gives up before.
COLLECTIVE_TIMEOUT_S = 3600.0


class ModelActor:
    """One rank of a role that holds a model."""

    def __init__(self, spot: Spot, plan: RlPlan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.job: Job = plan.job
        self.device = spot.device
        torch.set_num_threads(spot.threads)
        self._examples: list[Sample] = []
        self._mini_batches: list[MiniBatch] = []
        self._packed = self.plan.packed

    def where(self) -> tuple[str, list[str]]:
        """Address of the node, and the GPUs that Ray gave this process (numbers, or identifiers where the node is set up so)."""
        return ray.util.get_node_ip_address(), [str(gpu) for gpu in ray.get_gpu_ids()]

    def address(self) -> str:
        """Where the ranks of this role meet; asked of the first."""
        return free_address()

    def join(self, rank: int, world_size: int, address: str) -> None:
        """Be this rank, and meet the others."""
        self.rank, self.world_size = rank, world_size
        os.environ["LOCAL_RANK"] = (
            "0"  # what DeepSpeed wants to know; Ray shows each process its own GPU only
        )
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            init_method=address,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=max(COLLECTIVE_TIMEOUT_S, 2 * self.job.cluster.hang_timeout_s)),
        )

    def take(self, examples: Sequence[Sample], mini_batches: Sequence[MiniBatch], packed: bool) -> None:
        """The answers of a step, the layout of its updates, and whether answers share a row."""
        self._examples, self._mini_batches, self._packed = list(examples), list(mini_batches), packed

    def _batches(self, mini_batch: MiniBatch, columns: Columns) -> Iterator[dict[str, Any]]:
        for own in mini_batch.ranks[self.rank]:
            values = {name: [arrays[i] for i in own] for name, arrays in columns.items()}
            examples = [self._examples[i] for i in own]
            yield token_tensors(
                examples, values, packed=self._packed, pad_id=self.plan.pad_id, shared=mini_batch.shared
            )

    def _by_answer(self, results: Iterator[torch.Tensor]) -> dict[int, np.ndarray]:
        """Values of the tokens of each of this rank's answers, float32."""
        found: dict[int, np.ndarray] = {}
        micro_batches = [own for mini_batch in self._mini_batches for own in mini_batch.ranks[self.rank]]
        for own, result in zip(micro_batches, results, strict=True):
            counts = [int(self._examples[i].trained.sum()) for i in own]
            parts = np.split(result.float().cpu().numpy(), np.cumsum(counts)[:-1]) if own else []
            found.update(zip(own, parts, strict=True))
        return found

    def _all_batches(self) -> Iterator[dict[str, Any]]:
        return (batch for mini_batch in self._mini_batches for batch in self._batches(mini_batch, {}))


class LearnerActor(ModelActor):
    """A role that trains."""

    learner: Learner[Any]
    #: Written before the kinds of its tensors in a checkpoint, which several roles share.
    kind_prefix = ""

    def save(self, step: int, state: dict[str, Any]) -> int | None:
        """Hand the state to the writer; returns the newest committed step that nobody heard of yet."""
        self.writer.save(step, (self._named(fragment) for fragment in self.learner.fragments()), state)
        return self._committed()

    def finish_saving(self) -> int | None:
        """Return when everything is committed."""
        self.writer.wait()
        if self.retention is None:
            return None
        self.retention.wait()  # of an earlier one, beside which a new commit is not looked at
        newest = self._committed()
        self.retention.wait()
        return newest

    def load(self, step: int) -> None:
        """Take in a checkpoint."""
        reader = CheckpointReader(open_store(self.plan.run_uri), step)
        own = _OwnKinds(reader, self.kind_prefix)
        self.learner.load(own, reader.state[f"{self.kind_prefix}optimizer_step"])  # type: ignore[arg-type]

    def optimizer_step(self) -> int:
        """Updates so far."""
        return self.learner.optimizer_step()

    def _open_writer(self, rank: int, world_size: int, epoch: int, recorder: Any) -> None:
        store = open_store(self.plan.run_uri)
        self.writer = CheckpointWriter(
            store,
            epoch,
            rank,
            world_size,
            backlog=self.job.checkpoint.backlog,
            timeout_s=self.job.checkpoint.commit_timeout_s,
        )

        def cleanup_failed(error: Exception) -> None:
            recorder.event.remote("failure", f"old checkpoints could not be deleted: {error}")

        self.retention = (
            Retention(store, self.writer, self.job.checkpoint.keep, epoch, cleanup_failed)
            if rank == 0
            else None
        )

    def _committed(self) -> int | None:
        return self.retention.look() if self.retention is not None else None

    def _named(self, fragment: Fragment) -> Fragment:
        f = fragment
        return Fragment(f.name, f"{self.kind_prefix}{f.kind}", f.shape, f.dtype, f.offset, f.data)


class PolicyActor(LearnerActor):
    """One rank of the policy, with the engine that draws its answers on the same tensors."""

    def build(self, epoch: int, recorder: Any) -> None:
        """Model, engine and writer."""
        files = job_files(self.job, node_cache_dir())
        self.recorder, self.step = recorder, 0
        self._asked: Any = None
        self.store = open_store(self.plan.run_uri)
        self.tokenizer = load_tokenizer(files, self.job.model)
        rl = self.job.rl
        assert rl.ratio is not None
        assert rl.clip_low is not None
        assert rl.clip_high is not None
        objective = PolicyObjective(
            ratio=rl.ratio,
            clip=Clip(rl.clip_low, rl.clip_high, rl.clip_dual),
            temperature=self.job.rollout.temperature,
            kl_in_loss=rl.kl_estimator if rl.kl_in == "loss" and rl.kl_coef else None,
            kl_weighted=bool(rl.kl_weighted),
            importance_cap=rl.importance_cap,
            tell=lambda logprobs_N: self._seen.append(logprobs_N.cpu()),
        )
        self._seen: list[torch.Tensor] = []
        module = setup.build_module(self.job, files, self.plan.stage, self.device)
        self.learner = Learner(self.job, module, objective, stage=self.plan.stage, device=self.device)
        self._gathered: GatheredModel | None = None
        if self.plan.stage == 3 and not self.job.rollout.engines:
            self._gathered = GatheredModel(self.job, self.learner, self.device)
        inside = self._gathered.module if self._gathered else self.learner.module
        self.engine = TransformersEngine(inside, self.tokenizer, batch_size=self.job.rollout.batch_size)
        self._open_writer(self.rank, self.plan.savers, epoch, recorder)

    def generate(self, units: Sequence[Unit], may_leave: bool = False) -> list[Answers]:
        """Answers of each unit; of the first ones only where the ranks may leave and the recorder says that they should."""
        if self._gathered is not None:
            self._gathered.gather()
        answers: list[Answers] = []
        try:
            for unit in units:
                if may_leave and self._should_leave():
                    break
                answers.append(draw_unit(self.engine, self.tokenizer, unit, self.job.rollout))
        finally:
            if self._gathered is not None:
                self._gathered.free()
        return answers

    def _should_leave(self) -> bool:
        """What the recorder answered to an earlier question, without waiting for it."""
        if self._asked is None:
            self._asked = self.recorder.heard.remote()
        if not ray.wait([self._asked], timeout=0)[0]:
            return False
        leave: bool = ray.get(self._asked)
        self._asked = None
        return leave

    def ship(self) -> Shipped:
        """Put this rank's share of the trained weights where engines can take them from."""
        buckets = self.learner.weights(bucket_bytes=self.job.rollout.bucket_bytes)
        return ship(buckets, self.rank, self.world_size)

    def logprobs(self, *, reference: bool = False) -> dict[int, np.ndarray]:
        """log p of the tokens of this rank's answers; of the reference by switching the adapter off."""
        if not reference:
            return self._by_answer(self.learner.infer(self._all_batches(), "logprobs"))
        module: Any = self.learner.module
        with module.disable_adapter():
            return self._by_answer(self.learner.infer(self._all_batches(), "logprobs"))

    def update(self, number: int, columns: Columns, learning_rate: float, kl_coef: float) -> StepResult:
        """One optimizer update on a mini-batch."""
        self._seen = []
        coef = {"kl_coef": torch.tensor([kl_coef])}
        batches = (batch | coef for batch in self._batches(self._mini_batches[number], columns))
        return self.learner.step(batches, 1, learning_rate)

    def seen_logprobs(self) -> dict[int, np.ndarray]:
        """log p of the tokens of this rank's answers before the update that was just made, which was given none."""
        return self._by_answer(iter(self._seen))

    def suites(self, when: str, step: int) -> None:
        """Measure the job's suites."""
        self.step = step
        measure_suites(self, when)  # type: ignore[arg-type]

    def peak_memory_gb(self) -> float:
        """Peak memory of this rank in GB."""
        return self.learner.peak_memory_gb()


class CriticActor(LearnerActor):
    """One rank of the critic: values of the states before each token of an answer."""

    kind_prefix = "critic."

    def build(self, epoch: int, recorder: Any) -> None:
        """Model, engine and writer."""
        job = self.plan.critic
        assert job is not None
        files = job_files(job, node_cache_dir())
        files = replace(files, score=NewScore(1, job.seed, zeros=True))
        module = setup.build_module(job, files, self.plan.stage, self.device)
        objective = ValueObjective(self.job.rl.value_clip)
        self.learner = Learner(job, module, objective, stage=self.plan.stage, device=self.device)
        self._open_writer(self.job.cluster.max_workers + self.rank, self.plan.savers, epoch, recorder)

    def values(self) -> dict[int, np.ndarray]:
        """Values of the tokens of this rank's answers."""
        return self._by_answer(self.learner.infer(self._all_batches(), "values"))

    def update(self, number: int, columns: Columns, learning_rate: float) -> StepResult:
        """One optimizer update on a mini-batch."""
        return self.learner.step(self._batches(self._mini_batches[number], columns), 1, learning_rate)


class ReferenceActor(ModelActor):
    """One rank of a reference that is a model of its own: what the policy was before training."""

    def build(self) -> None:
        """The model, which is never trained."""
        files = job_files(self.job, node_cache_dir())
        module = setup.build_module(self.job, files, 0, self.device)
        self._module = module.to(self.device).eval().requires_grad_(False)
        self._objective = PolicyObjective(temperature=self.job.rollout.temperature)

    def logprobs(self) -> dict[int, np.ndarray]:
        """log p of the tokens of this rank's answers."""

        def look() -> Iterator[torch.Tensor]:
            for batch in self._all_batches():
                with torch.no_grad():
                    there = {name: value.to(self.device) for name, value in batch.items()}
                    found = self._objective.logprobs(self._module, there)
                yield found

        return self._by_answer(look())


class _OwnKinds:
    """A reader of one role's tensors."""

    def __init__(self, reader: CheckpointReader, prefix: str) -> None:
        self._reader, self._prefix = reader, prefix

    def read(self, name: str, kind: str, offset: int, length: int) -> np.ndarray:
        """What `CheckpointReader.read` gives."""
        return self._reader.read(name, f"{self._prefix}{kind}", offset, length)
