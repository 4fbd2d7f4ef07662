"""Export a checkpoint as what users load: a model in Hugging Face format, or a PEFT adapter folder.

Tensors are read, merged, cast and written one layer at a time, so the model may be larger than memory. A merged adapter
is proven before anything is published: logits of base and adapter apart against those of the merged model.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from rayft.checkpoint import CheckpointReader
from rayft.errors import JobError
from rayft.model.card import model_card
from rayft.model.files import ModelFiles, load_tokenizer
from rayft.model.layout import file_groups
from rayft.model.locate import is_hub_id
from rayft.model.proof import MergeProof, prove_merge
from rayft.model.shards import TensorSpec, write_shards
from rayft.model.trained import Adapted, FullyTrained
from rayft.model.weights import Weights, is_score
from rayft.spec import Job
from rayft.storage import Store, open_store

SHARD_BYTES = 5_000_000_000
_REPORT = "export.json"


@dataclass(frozen=True)
class ExportReport:
    """What was exported; `export.json` beside the model holds the same.

    uri: where. base: identity of the base model. bytes: of all files. proof: of a merged adapter, else None.
    """

    uri: str
    base: str
    adapter: bool
    dtype: str
    bytes: int
    files: list[str] = field(default_factory=list)
    proof: MergeProof | None = None


def export_model(
    checkpoint: CheckpointReader,
    files: ModelFiles,
    job: Job,
    out: Store | Path | str,
    *,
    merge: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
    prompts: Sequence[Sequence[int]] = (),
    work_dir: Path | None = None,
) -> ExportReport:
    """Write the trained model of `checkpoint` to `out` and return what was written.

    files: the base model. merge: merge an adapter into the base in fp32 before the cast to `dtype`, and prove it on
    `prompts` (token ids); without it the adapter alone is written in PEFT's format, in fp32. work_dir: local folder
    with room for the whole model (default: beside a local `out`). An earlier export at `out` is replaced, config last, so
    that a half replaced model is never taken for a whole one; anything else there is refused (JobError). Raises
    StorageError if the checkpoint is of another model, or if a merged model does not equal its parts.
    """
    store = out if isinstance(out, Store) else open_store(out)
    local = store.local_path("config.json")
    if work_dir is None and local is not None:
        work_dir = local.parent.parent
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    previous = _previous(store)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=work_dir) as temporary:
        folder = Path(temporary)
        proof = None
        adapted = job.adapter.type != "none"
        if not adapted:
            full = FullyTrained(checkpoint, files, job.model)
            _write_weights(folder, full, dtype, max_shard_bytes)
            _write_configs(folder, full.skeleton, files, dtype)
        elif merge:
            trained = Adapted(checkpoint, files, job.model, job.adapter)
            _write_weights(folder, trained, dtype, max_shard_bytes)
            _write_configs(folder, trained.skeleton, files, dtype)
            proof = prove_merge(trained, files, job.model, folder, [list(p) for p in prompts])
        else:
            _write_adapter(folder, Adapted(checkpoint, files, job.model, job.adapter), files, job)
            dtype = torch.float32
        load_tokenizer(files, job.model).save_pretrained(folder)
        apart = adapted and not merge
        (folder / "README.md").write_text(model_card(job, adapter=apart, proof=proof), encoding="utf-8")
        report = ExportReport(
            uri=store.uri,
            base=files.identity,
            adapter=apart,
            dtype=str(dtype).removeprefix("torch."),
            bytes=sum(path.stat().st_size for path in folder.iterdir()),
            files=sorted(path.name for path in folder.iterdir()),
            proof=proof,
        )
        (folder / _REPORT).write_text(json.dumps(asdict(report), indent=2))
        _publish(folder, store, previous)
    return report


def _write_weights(
    folder: Path, trained: Adapted | FullyTrained, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Weights in the layout of the base model's files, in `dtype`; persistent buffers keep theirs, fp32 or integers."""
    base, module = trained.base, trained.skeleton
    groups = file_groups(base.names, base.conversions)
    empty = {
        name: tensor.to(torch.float32 if is_score(name) else dtype)
        for name, tensor in module.named_parameters()
    }
    empty = {**module.state_dict(), **empty}
    specs = [
        TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        for group in groups
        for name, tensor in group.results(empty.__getitem__, module).items()
    ]
    tensors = (item for group in groups for item in group.results(trained.read, module).items())
    write_shards(folder, specs, tensors, max_shard_bytes)
    written = ModelFiles(folder, "", str(folder), folder)
    Weights(written, module).close()  # refuses what would not load


def _write_configs(folder: Path, module: PreTrainedModel, files: ModelFiles, dtype: torch.dtype) -> None:
    config = copy.deepcopy(module.config)
    config.dtype = dtype
    config.architectures = [type(module).__name__]
    if files.score and config.pad_token_id is None:
        config.pad_token_id = (
            config.eos_token_id
        )  # transformers' own classifiers want one for more than one row
    config.save_pretrained(folder)
    generation = [] if files.score else [files.folder / "generation_config.json"]
    for file in [*generation, *files.folder.glob("*.py")]:
        if file.exists():
            shutil.copy(file, folder)


def _write_adapter(folder: Path, trained: Adapted, files: ModelFiles, job: Job) -> None:
    """PEFT's own format, naming the base model so that `AutoPeftModelForCausalLM` finds it."""
    module: Any = trained.module
    config = module.peft_config["default"]
    config.base_model_name_or_path = job.model.path if is_hub_id(job.model.path) else str(files.folder)
    config.revision = job.model.revision
    config.inference_mode = True
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(
        module, state_dict=trained.adapter_tensors(), save_embedding_layers=False
    )
    save_file(
        {name: t.contiguous().clone() for name, t in state.items()}, folder / "adapter_model.safetensors"
    )


def _previous(store: Store) -> list[str]:
    """Files of an earlier export at `store`. Raises JobError if something else is there."""
    if not store.exists(_REPORT):
        if any(True for _ in store.list()):
            raise JobError(
                f"{store.uri} is not empty and holds no export of rayft.",
                "Choose another place for the model.",
            )
        return []
    return json.loads(store.get(_REPORT))["files"]


def _publish(folder: Path, store: Store, previous: list[str]) -> None:
    """Replace an earlier export: configs go first and come last, so what is there is loadable or refused."""
    configs = ("config.json", "adapter_config.json")
    order = {_REPORT: 0, **dict.fromkeys(configs, 2)}
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (order.get(name, 1), name))
    store.delete(configs)
    for name in names:
        local = store.local_path(name)
        if local is None:
            store.upload(folder / name, name)
        else:
            local.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, local)
    store.delete(sorted(set(previous) - set(names)))
