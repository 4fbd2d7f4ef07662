"""The model card (README.md) of an exported model."""

from __future__ import annotations

import json

from rayft import __version__
from rayft.model.locate import is_hub_id
from rayft.model.proof import MergeProof
from rayft.spec import Job


def model_card(job: Job, *, adapter: bool, proof: MergeProof | None) -> str:
    """Markdown with the hub's metadata: base, data, settings, how to load, and the proof of a merge.

    adapter: the export is a PEFT adapter, not a whole model.
    """
    metadata = [f"library_name: {'peft' if adapter else 'transformers'}", f"tags: [rayft, {job.method}]"]
    if is_hub_id(job.model.path):
        metadata.append(f"base_model: {json.dumps(job.model.path)}")
    method = "full fine-tuning" if job.adapter.type == "none" else _adapter_line(job)
    train = job.train
    batch = (
        f"{train.global_batch_size} rows" if train.global_batch_size else f"{train.tokens_per_step} tokens"
    )
    lines = [
        "---",
        *metadata,
        "---",
        f"# {job.name}",
        "",
        f"`{job.model.path}` fine-tuned with rayft {__version__} ({method}).",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(f'`{source.path}`' for source in job.data.train)} |",
        f"| batch per step | {batch} |",
        f"| learning rate | {train.learning_rate:g}, {train.lr_scheduler} |",
        f"| precision | {train.precision} |",
        f"| seed | {job.seed} |",
        "",
        "```python",
        *_use(job, adapter),
        "```",
    ]
    if proof:
        lines += ["", _proof_text(proof)]
    return "\n".join(lines) + "\n"


def _use(job: Job, adapter: bool) -> list[str]:
    """Lines of Python that load the model."""
    kind = "SequenceClassification" if job.method == "reward" else "CausalLM"
    library, name = (
        ("peft", f"AutoPeftModelFor{kind}") if adapter else ("transformers", f"AutoModelFor{kind}")
    )
    imports = (
        [f"from peft import {name}", "from transformers import AutoTokenizer"]
        if adapter
        else [f"from {library} import {name}, AutoTokenizer"]
    )
    arguments = f", num_labels={job.reward.heads}" if adapter and job.method == "reward" else ""
    arguments += "" if adapter else ', dtype="auto"'
    return [
        *imports,
        "",
        f'model = {name}.from_pretrained("PATH"{arguments})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]


def _adapter_line(job: Job) -> str:
    adapter = job.adapter
    variants = [name for name, on in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if on]
    targets = (
        adapter.target_modules
        if isinstance(adapter.target_modules, str)
        else ", ".join(adapter.target_modules)
    )
    kind = " ".join([adapter.type.replace("lora", "LoRA"), *variants])
    return f"{kind}, r = {adapter.lora_r}, alpha = {adapter.lora_alpha:g}, on {targets}"


def _proof_text(proof: MergeProof) -> str:
    return (
        f"The adapter was merged in fp32. On {proof.prompts} prompts ({proof.tokens} tokens) the merge differs from base "
        f"and adapter by {proof.merge_error:.1e} of the largest logit (allowed: {proof.tolerance:.0e}); the files as stored "
        f"differ by {proof.stored_error:.1e}, where the adapter itself moves logits by {proof.adapter_effect:.1e}, and "
        f"agree on the likeliest token at {proof.same_top:.1%} of positions."
    )
