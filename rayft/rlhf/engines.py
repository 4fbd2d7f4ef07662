"""Where answers are drawn: inside the policy's processes on its own tensors, gathered under ZeRO-3, or in processes apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rayft.generate.engine import Drawn
from rayft.generate.hf import TransformersEngine
from rayft.generate.prompts import answer_text
from rayft.learner.learner import Learner
from rayft.model.files import job_files, load_tokenizer
from rayft.rlhf.placement import Spot
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.rollout import Unit
from rayft.rlhf.weights import Bucket, Shipment, receive
from rayft.spec import Job, Rollout
from rayft.storage import node_cache_dir
from rayft.train import setup

#: Answers of a unit, each with its text.
Answers = list[tuple[Drawn, str]]


@dataclass(frozen=True)
class Held:
    """What an engine holds after a sync: the version, checksums of the buckets as they lie in its memory, times."""

    version: int
    checksums: list[str]
    seconds: dict[str, float]


def draw_unit(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerBase, unit: Unit, rollout: Rollout
) -> Answers:
    """The answers of one unit of work."""
    drawn = engine.draw(
        unit.prompts,
        unit.seeds,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )
    return [(answer, answer_text(tokenizer, answer.ids)) for answer in drawn]


class EngineActor:
    """An engine in a process of its own. It holds nothing that the policy cannot send again."""

    def __init__(self, spot: Spot, plan: RlPlan, rank: int, size: int) -> None:
        torch.set_num_threads(spot.threads)
        self.job, self._device = plan.job, spot.device
        self._version = -1

    def build(self) -> None:
        """The base model, with an adapter if the policy has one."""
        files = job_files(self.job, node_cache_dir())
        self._tokenizer = load_tokenizer(files, self.job.model)
        module = setup.build_module(self.job, files, 0, self._device)
        self._module = module.to(self._device).eval().requires_grad_(False)
        self._engine = TransformersEngine(
            self._module, self._tokenizer, batch_size=self.job.rollout.batch_size
        )

    def take_weights(self, version: int, shipments: Sequence[Shipment]) -> Held:
        """Hold the policy's weights of this version from now on."""
        checksums, seconds = receive(self._module, shipments)
        self._version = version
        return Held(version, checksums, seconds)

    def generate(self, unit: Unit) -> tuple[int, Answers]:
        """Answers of a unit, and the version of the weights that wrote them."""
        return self._version, draw_unit(self._engine, self._tokenizer, unit, self.job.rollout)


class GatheredModel:
    """A whole copy of a policy that ZeRO-3 has sharded, there for the length of a generation phase and no longer."""

    def __init__(self, job: Job, learner: Learner[Any], device: str) -> None:
        self._learner, self._device = learner, device
        self.module = setup.build_module(job, job_files(job, node_cache_dir()), 0, device).eval()
        self.module.requires_grad_(False)
        self._parameters = dict(self.module.named_parameters())
        self.free()

    def gather(self) -> None:
        """Take in the weights as they are; a collective."""
        buckets = self._learner.weights(bucket_bytes=self._learner.job.rollout.bucket_bytes, trained=False)
        for bucket in buckets:
            self._take(bucket)

    def free(self) -> None:
        """Give the memory of the weights back."""
        for parameter in self._parameters.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)

    def _take(self, bucket: Bucket) -> None:
        for name, tensor in bucket:
            self._parameters[name].data = tensor.detach().clone()
