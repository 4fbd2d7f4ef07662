"""`rayft check` for jobs that learn from rewards: the prompts as they will be asked."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.markup import escape

from rayft.data.template import ChatTokenizer
from rayft.errors import DataError
from rayft.model.files import load_tokenizer, resolve_model
from rayft.rlhf.held_out import held_out_prompts
from rayft.rlhf.prompts import PromptSet
from rayft.rlhf.rewards import load_function
from rayft.spec import Job
from rayft.storage import node_cache_dir
from rayft.train.prepare import with_absolute_paths


def check_job(job: Job, *, samples: int = 3) -> int:
    """Show prompts of the first epoch and held-out ones, lengths and what is left out. Raises DataError if nothing is left."""
    job = with_absolute_paths(job)
    console, node_dir = Console(), node_cache_dir()
    chat = ChatTokenizer(load_tokenizer(resolve_model(job.model, node_dir), job.model))
    longest = job.data.max_length - job.rollout.max_new_tokens
    prompts = PromptSet(job.data, chat, seed=job.seed, longest=longest, node_dir=node_dir)
    for source in job.rewards:
        if source.type == "function":
            load_function(source.path)
    _show(prompts, "data.train", console, samples)
    if job.data.eval:
        _show(held_out_prompts(job, chat, node_dir), "data.eval", console, 1)
    return 0


def _show(prompts: PromptSet, key: str, console: Console, samples: int) -> None:
    """The first prompts of an epoch, the lengths of all, and how many are left out."""
    lengths, too_long = [], 0
    for position in range(prompts.order.epoch_rows()):
        prompt = prompts.at(position)
        if prompt is None:
            too_long += 1
            continue
        lengths.append(len(prompt.ids))
        if len(lengths) <= samples:
            console.rule(
                f"{key}, prompt {len(lengths)}: {len(prompt.ids)} tokens, columns {', '.join(prompt.columns) or 'none'}"
            )
            console.print(escape(prompts.chat.tokenizer.decode(list(prompt.ids))), highlight=False)
    if not lengths:
        raise DataError(
            f"No prompt of {key} has at most {prompts.longest} tokens (data.max_length less rollout.max_new_tokens).",
            "Raise data.max_length, or lower rollout.max_new_tokens.",
        )
    console.rule()
    low, middle, high = np.percentile(lengths, [0, 50, 100])
    console.print(
        f"{key}: {len(lengths)} prompts of {low:.0f} to {high:.0f} tokens, half of them up to {middle:.0f}",
        highlight=False,
    )
    if too_long:
        console.print(
            f"{too_long} are longer than {prompts.longest} tokens and are left out",
            style="yellow",
            highlight=False,
        )
