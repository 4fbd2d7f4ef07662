"""One run of TRL's SFTTrainer on a workload, in a process of its own: `python -m tests.bench.side_trl WORKLOAD SETTING`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from tests.bench.workload import Workload, matrix_rate, peak_memory_gb

#: How TRL's documentation offers to fill batches; the benchmark tries all and keeps the fastest.
SETTINGS: dict[str, dict[str, Any]] = {
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True},
}


def run(work: Workload, setting: str) -> dict[str, Any]:
    """Train and report real tokens a second over the timed steps, the padding share and the peak memory."""
    import torch

    torch.set_num_threads(work.threads)
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    adapter = _adapter() if work.method == "lora" else None
    # Master weights in fp32 under autocast, or, below an adapter, only the adapter in fp32.
    dtype = torch.float32 if work.precision == "bf16" and adapter is None else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if work.random:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work.model), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(work.model, **options)
    if adapter is not None and work.precision == "pure_bf16":
        from peft import get_peft_model

        model, adapter = get_peft_model(model, adapter, autocast_adapter_dtype=False), None

    stamps: list[float] = []
    shapes: list[tuple[int, int, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if work.device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            real = ids.numel() if mask is None else int(mask.sum())
            shapes.append((real, ids.numel(), int((inputs["labels"] != -100).sum())))
            return super().training_step(model, inputs, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **{
                "output_dir": folder,
                "per_device_train_batch_size": 1 if setting == "packing" else work.batch,
                "max_steps": work.warmup + work.steps,
                "max_length": work.max_length,
                "assistant_only_loss": True,
                "learning_rate": 1e-5,
                "gradient_checkpointing": False,
                "bf16": work.precision == "bf16",
                "use_cpu": work.device == "cpu",
                "dataloader_pin_memory": work.device != "cpu",
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                **SETTINGS[setting],
            }
        )
        trainer = Counting(
            model,
            args=config,
            train_dataset=load_dataset("json", data_files=work.rows, split="train", cache_dir=folder),
            processing_class=AutoTokenizer.from_pretrained(work.model),
            peft_config=adapter,
            callbacks=[Clock()],
        )
        trainer.train()
    real, computed, trained = (sum(column) for column in zip(*shapes[work.warmup :], strict=True))
    seconds = stamps[-1] - stamps[work.warmup - 1]
    return {
        "tokens_per_s": real / seconds,
        "tokens": real,
        "trained_tokens": trained,
        "padding": 1 - real / computed,
        "peak_memory_gb": peak_memory_gb(work.device),
        "matrix_rate": matrix_rate(work.device),
        "setting": setting,
    }


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    print(json.dumps(run(Workload.from_json(sys.argv[1]), sys.argv[2])))
