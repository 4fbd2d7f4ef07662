"""The trained model as tensors: a checkpoint's weights over the base model's, with the adapter merged or apart."""

from __future__ import annotations

import numpy as np
import torch

from rayft.checkpoint import CheckpointReader
from rayft.errors import StorageError
from rayft.model.adapters import add_adapter, trainable
from rayft.model.files import ModelFiles
from rayft.model.streamed import StreamedModel, base_name, empty_model, frozen_name
from rayft.model.weights import Weights, skeleton
from rayft.spec import Adapter, Model


class FullyTrained:
    """A fully fine-tuned model: what the checkpoint holds, and the base for what was never trained (buffers).

    base: the weights the run started from. Raises StorageError if the checkpoint is of another model.
    """

    def __init__(self, checkpoint: CheckpointReader, files: ModelFiles, model: Model) -> None:
        self.skeleton = skeleton(files, model)
        self.base = Weights(files, self.skeleton)
        self._checkpoint, self._trained = checkpoint, set(checkpoint.names("param"))
        _refuse_strangers(self._trained, set(self.base.names) | set(self.base.tied), files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of the state-dict name `name` after training."""
        if name in self._trained:
            return read_param(self._checkpoint, name)
        other = self.base.tied.get(name, name)
        return read_param(self._checkpoint, other) if other in self._trained else self.base.read(other)


class Adapted:
    """A model trained with an adapter: `adapted` runs base and adapter apart, `read` returns merged weights.

    Raises StorageError if the checkpoint's adapter does not belong to this job's model and adapter settings.
    """

    def __init__(
        self, checkpoint: CheckpointReader, files: ModelFiles, model: Model, adapter: Adapter
    ) -> None:
        self.skeleton = skeleton(files, model)
        self.base = Weights(files, self.skeleton)
        # A QLoRA adapter is applied to the unquantized weights, for which it is an ordinary LoRA.
        lora = adapter.model_copy(update={"type": "lora"})
        self.module = add_adapter(empty_model(files, model), lora, seed=0)
        self._checkpoint, self._trained = checkpoint, set(checkpoint.names("param"))
        _refuse_strangers(self._trained ^ set(trainable(self.module)), set(), files)
        self.adapted = StreamedModel(self.module, self._read_part)
        self._unit_of = {
            base: unit
            for unit, part in self.adapted.units.items()
            for name, _ in part.named_parameters(remove_duplicate=False)
            if (base := base_name(f"{unit}.{name}")) is not None
        }
        self._merged: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def read(self, name: str) -> torch.Tensor:
        """The tensor of the state-dict name `name` with the adapter merged in, fp32; read in order, layer by layer."""
        unit = self._unit_of.get(name)
        if unit is None:
            return self.read_base(name)
        if self._merged[0] != unit:
            self._merged = ("", {})  # free one layer before the next comes
            self._merged = (unit, self.adapted.merged(unit))
        return self._merged[1][name]

    def read_base(self, name: str) -> torch.Tensor:
        """The tensor of the state-dict name `name` before training."""
        return self.base.resolve(name)

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their names in the module with the adapter, each tied one under all its names."""
        first = {parameter: name for name, parameter in self.module.named_parameters()}
        every = self.module.named_parameters(remove_duplicate=False)
        return {
            name: read_param(self._checkpoint, first[parameter])
            for name, parameter in every
            if first[parameter] in self._trained
        }

    def _read_part(self, name: str) -> torch.Tensor:
        if name in self._trained:
            return read_param(self._checkpoint, name)
        frozen = frozen_name(name)
        assert frozen is not None, f"{name} is neither trained nor of the base"
        return self.read_base(frozen)


def read_param(checkpoint: CheckpointReader, name: str) -> torch.Tensor:
    """A trained tensor in its shape; the checkpoint's bfloat16 comes as uint16."""
    array = checkpoint.read(name, "param")
    flat = (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == np.uint16
        else torch.from_numpy(array)
    )
    return flat.view(checkpoint.shape(name, "param"))


def _refuse_strangers(names: set[str], known: set[str], files: ModelFiles) -> None:
    strange = sorted(names - known)
    if strange:
        raise StorageError(
            f"The checkpoint does not belong to this job: {strange[0]} (and {len(strange) - 1} more) does not fit {files.source}.",
            "Export with the job file that the run was started with (job.yaml in the run folder).",
        )
