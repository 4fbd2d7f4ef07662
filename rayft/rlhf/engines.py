"""Where answers are drawn: inside the policy's processes on its own tensors, gathered under ZeRO-3, or in processes apart."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rayft.generate.engine import Drawn
from rayft.generate.hf import TransformersEngine
from rayft.generate.prompts import answer_text, stop_token_ids
from rayft.learner.learner import Learner
from rayft.model.adapters import lora_config
from rayft.model.files import ModelFiles, job_files, load_config, load_tokenizer
from rayft.model.load import build_empty
from rayft.rlhf.placement import Spot
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.rollout import Unit
from rayft.rlhf.weights import Bucket, Shipment, receive, unpack
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
    """The answers of one unit of work, with their text."""
    return [(answer, answer_text(tokenizer, answer.ids)) for answer in draw(engine, unit, rollout)]


def draw(engine: TransformersEngine, unit: Unit, rollout: Rollout) -> list[Drawn]:
    """The answers of one unit of work."""
    return engine.draw(
        unit.prompts,
        unit.seeds,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )


class EngineActor:
    """An engine in a process of its own. It holds nothing that the policy cannot send again."""

    def __init__(self, spot: Spot, plan: RlPlan, rank: int, size: int) -> None:
        torch.set_num_threads(spot.threads)
        self.job, self._spot = plan.job, spot
        self._version = -1

    def build(self) -> None:
        """The base model, with an adapter if the policy has one."""
        files = job_files(self.job, node_cache_dir())
        self._tokenizer = load_tokenizer(files, self.job.model)
        kind: Callable[..., Copy] = (
            TransformersCopy if self.job.rollout.engine == "transformers" else VllmCopy
        )
        self._copy = kind(self.job, files, self._tokenizer, self._spot)

    def take_weights(self, version: int, shipments: Sequence[Shipment]) -> Held:
        """Hold the policy's weights of this version from now on."""
        checksums, seconds = self._copy.take(version, shipments)
        self._version = version
        return Held(version, checksums, seconds)

    def generate(self, unit: Unit) -> tuple[int, Answers]:
        """Answers of a unit, and the version of the weights that wrote them."""
        drawn = self._copy.draw(unit)
        return self._version, [(answer, answer_text(self._tokenizer, answer.ids)) for answer in drawn]


class Copy(Protocol):
    """A model of its own that follows the policy."""

    def take(self, version: int, shipments: Sequence[Shipment]) -> tuple[list[str], dict[str, float]]:
        """Take in weights; returns the checksum of each bucket and times."""
        ...

    def draw(self, unit: Unit) -> list[Drawn]:
        """Answers of a unit."""
        ...


class TransformersCopy:
    """A transformers model; its checksums are of the tensors it computes with."""

    def __init__(self, job: Job, files: ModelFiles, tokenizer: PreTrainedTokenizerBase, spot: Spot) -> None:
        module = setup.build_module(job, files, 0, spot.device)
        self._module = module.to(spot.device).eval().requires_grad_(False)
        self._rollout = job.rollout
        self._engine = TransformersEngine(self._module, tokenizer, batch_size=job.rollout.batch_size)

    def take(self, version: int, shipments: Sequence[Shipment]) -> tuple[list[str], dict[str, float]]:
        """See `Copy.take`."""
        return receive(self._module, shipments)

    def draw(self, unit: Unit) -> list[Drawn]:
        """See `Copy.draw`."""
        return draw(self._engine, unit, self._rollout)


class VllmCopy:
    """vLLM; its checksums are of the bytes it was given, since it may keep weights in a layout of its own."""

    def __init__(self, job: Job, files: ModelFiles, tokenizer: PreTrainedTokenizerBase, spot: Spot) -> None:
        from rayft.generate.vllm import VllmEngine, kv_cache_gib

        self._job, self._rollout = job, job.rollout
        # What is sent is a list of names; PEFT's configuration needs the modules they belong to.
        self._config: dict[str, Any] | None = None
        if job.adapter.type != "none":
            with torch.device("meta"):
                empty = build_empty(files, job.model, dtype=torch.bfloat16, attention="auto")
            self._config = lora_config(empty, job.adapter).to_dict()
        if spot.device == "cpu":
            os.environ.setdefault(
                "VLLM_CPU_KVCACHE_SPACE",
                str(kv_cache_gib(load_config(files, job.model), job.data.max_length, job.rollout.batch_size)),
            )
        share: dict[str, Any] = {}
        if 0 < spot.gpus < 1:
            # Beside other roles it has its part of the GPU, not vLLM's usual 90 % of all of it, and a cache of a size that does not
            # depend on what the others hold just now.
            gib = kv_cache_gib(load_config(files, job.model), job.data.max_length, job.rollout.batch_size)
            share = {"gpu_memory_utilization": round(0.9 * spot.gpus, 3), "kv_cache_memory_bytes": gib << 30}
        self._engine = VllmEngine(
            files.folder,
            files.tokenizer,
            stop_token_ids(tokenizer, _generation_config(files)),
            dtype="float32" if job.train.precision == "fp32" else "bfloat16",
            max_length=job.data.max_length,
            batch_size=job.rollout.batch_size,
            seed=job.seed,
            lora_r=job.adapter.lora_r if self._config else None,
            options=share | job.rollout.vllm,
        )

    def take(self, version: int, shipments: Sequence[Shipment]) -> tuple[list[str], dict[str, float]]:
        """See `Copy.take`."""
        named, checksums, seconds = unpack(shipments)
        began = time.perf_counter()
        if self._config is None:
            self._engine.take_weights(named)
        else:
            folder = tempfile.TemporaryDirectory(prefix="rayft-adapter-")
            save_adapter(Path(folder.name), named, self._config)
            self._engine.take_adapter(Path(folder.name), version)
            self._adapter = folder  # vLLM may read it again; the one before goes now
        return checksums, {**seconds, "load": time.perf_counter() - began}

    def draw(self, unit: Unit) -> list[Drawn]:
        """See `Copy.draw`."""
        rollout = self._rollout
        return self._engine.draw(
            unit.prompts,
            unit.seeds,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            stop=rollout.stop,
        )


def save_adapter(folder: Path, named: Sequence[tuple[str, torch.Tensor]], config: dict[str, Any]) -> None:
    """Write an adapter in PEFT's format, from the parameters of the wrapped model."""
    tensors = {name.replace(".default.", "."): tensor.contiguous().clone() for name, tensor in named}
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, default=str))


def _generation_config(files: ModelFiles) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(files.folder)
    except OSError:  # there is none
        return None


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
