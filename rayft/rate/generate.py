"""Answers to rate, written by the models that are to be compared."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rayft.data.template import ChatTokenizer
from rayft.errors import DataError
from rayft.generate.hf import TransformersEngine
from rayft.generate.load import load_model
from rayft.generate.prompts import answer_text, chat_prompt, text_prompt
from rayft.rate.items import Answer, Item, item


def generate_items(
    prompts: Sequence[tuple[str, Any]],
    models: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    cache_dir: Path,
    say: Callable[[str], None],
) -> list[Item]:
    """One item a prompt with `samples` answers of each model (what `load_model` takes: a run, a folder, a hub id).

    Answers that are empty, or say what another one says, are left out, and so are prompts with fewer than two left.
    Raises DataError if that leaves none.
    """
    answers: list[list[Answer]] = [[] for _ in prompts]
    for number, path in enumerate(models):
        module, tokenizer = load_model(path, cache_dir=cache_dir)
        engine, chat = TransformersEngine(module.eval(), tokenizer), ChatTokenizer(tokenizer)
        ids = [
            text_prompt(tokenizer, prompt)
            if isinstance(prompt, str)
            else chat_prompt(chat, prompt, where=where)
            for where, prompt in prompts
        ]
        for sample in range(samples):
            made = engine.generate(
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed + 1000 * number + sample,
            )
            for own, tokens in zip(answers, made, strict=True):
                if text := answer_text(tokenizer, tokens).strip():
                    own.append(Answer(text, path))
        say(f"{path}: {samples * len(prompts)} answers")
        del module, engine
        gc.collect()
    items = [item(prompt, own) for (_, prompt), own in zip(prompts, answers, strict=True)]
    found = [one for one in items if len(one.answers) > 1]
    if not found:
        raise DataError(
            "No prompt got two different answers.",
            "Raise --temperature or --samples, or compare other models.",
        )
    return found
