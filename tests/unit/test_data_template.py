"""What is trained is what the model has to generate: every turn, with its end, after exactly the tokens of inference."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from rayft.data.formats import Conversation, PromptCompletion, Text
from rayft.data.template import ChatTokenizer, Sample
from rayft.errors import DataError, JobError
from tests.tiny_data import CHATML_MARKED, FAMILIES, byte_tokenizer, family_tokenizer, space_tokenizer

CHATML = FAMILIES["chatml"][0]


def conversation(
    *turns: str, system: str | None = None, train: list[bool | None] | None = None
) -> Conversation:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Conversation(messages, None, train or [None] * len(messages))


def trained_runs(sample: Sample) -> list[tuple[int, int]]:
    """[start, end) of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.trained.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def check_like_inference(tokenizer: ChatTokenizer, row: Conversation, samples: list[Sample]) -> list[str]:
    """Every assistant turn is trained once, right after the tokens inference starts from. Returns what is trained.

    Exactly, for the first turn of a document; white space at the start of an answer that would merge with its prompt can
    be exact for that turn or as history of later ones, and is for that turn.
    """
    answers = []
    decode = tokenizer.tokenizer.decode
    runs = [(sample, run) for sample in samples for run in trained_runs(sample)]
    turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
    assert len(runs) == len(turns)
    for i, (sample, (start, end)) in zip(turns, runs, strict=True):
        prompt = tokenizer.prompt_ids(row.messages[:i], row.tools)
        assert decode(sample.ids[:start]) == decode(prompt)
        assert sample.trained[:start].any() or sample.ids[:start].tolist() == prompt
        assert sample.ids[start - 1] == prompt[-1]
        answers.append(decode(sample.ids[start:end]))
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_trained_with_its_end_after_the_prompt_of_inference(family: str) -> None:
    tokenizer = family_tokenizer(family)
    row = conversation("What is it?", "A bus.", "\nand\n\nthat", "\n\nA\nthird", "more", "last é😀")
    samples = tokenizer.encode(row)
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(family, FAMILIES[family][2])
    answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
    if family in ("llama3", "gemma"):  # these trim
        answers = [a.strip() for a in answers]
    if family == "mistral":
        answers = [" " + a for a in answers]
    if family == "qwen3":
        answers = [f"<think>\n\n</think>\n\n{a}" for a in answers]
    assert check_like_inference(tokenizer, row, samples) == [a + end for a in answers]
    assert len(samples) == (3 if family == "qwen3" else 1)
    assert not any(sample.trained[0] for sample in samples)


@given(st.lists(st.text(st.sampled_from("ab th\n é"), max_size=8), min_size=2, max_size=6))
def test_any_content_is_trained_as_inference_would_see_it(turns: list[str]) -> None:
    row = conversation(*turns[: len(turns) // 2 * 2])
    tokenizer = family_tokenizer("chatml")
    answers = check_like_inference(tokenizer, row, tokenizer.encode(row))
    assert answers == [m["content"] + "<|im_end|>" for m in row.messages if m["role"] == "assistant"]


def test_thinking_that_the_template_strips_from_history_makes_documents_of_their_own() -> None:
    tokenizer = family_tokenizer("qwen3")
    row = conversation("2+2", "4", "3+3", "6")
    row.messages[1]["reasoning_content"] = "two and two"
    row.messages[3]["reasoning_content"] = "three and three"
    samples = tokenizer.encode(row)
    assert [tokenizer.tokenizer.decode(s.ids[s.trained]) for s in samples] == [
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
        "<think>\nthree and three\n</think>\n\n6<|im_end|>",
    ]
    assert "two and two" not in tokenizer.tokenizer.decode(samples[1].ids)


def test_a_system_message_that_wanders_through_the_history() -> None:
    tokenizer = family_tokenizer("mistral")
    row = conversation("one", "1", "two", "2", system="Be brief.")
    samples = tokenizer.encode(row)
    assert len(samples) == 2
    check_like_inference(tokenizer, row, samples)


def test_a_turn_begins_where_its_mark_does() -> None:
    template = CHATML_MARKED.replace("{% generation %}", "aside: {% generation %}")
    tokenizer = ChatTokenizer(byte_tokenizer(template))
    (sample,) = tokenizer.encode(conversation("q", "x", "r", "y"))
    answers = [tokenizer.tokenizer.decode(sample.ids[a:b]) for a, b in trained_runs(sample)]
    assert answers == ["x<|im_end|>", "y<|im_end|>"]


def test_generation_marks_agree_with_transformers() -> None:
    tokenizer = byte_tokenizer(CHATML_MARKED)
    row = conversation("a th", "b th", "c", "d\n\nd")
    (sample,) = ChatTokenizer(tokenizer).encode(row)
    theirs = tokenizer.apply_chat_template(
        row.messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    assert sample.ids.tolist() == theirs["input_ids"]
    # Theirs lacks the turn-end tokens, which this template leaves outside its marks.
    ends = (sample.ids == tokenizer.convert_tokens_to_ids("<|im_end|>")) & sample.trained
    assert (sample.trained & ~ends).astype(int).tolist() == theirs["assistant_masks"]
    assert ends.sum() == 2


@pytest.mark.parametrize(
    ("loss_on", "expected"), [("assistant", "x1<|im_end|>x2<|im_end|>"), ("completion", "x2<|im_end|>")]
)
def test_loss_on_chooses_turns(loss_on: str, expected: str) -> None:
    tokenizer = ChatTokenizer(byte_tokenizer(CHATML), loss_on)  # type: ignore[arg-type]
    (sample,) = tokenizer.encode(conversation("q", "x1", "r", "x2"))
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == expected


def test_loss_on_all_trains_all_but_the_first_token_and_messages_that_say_no() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer(CHATML), "all")
    (sample,) = tokenizer.encode(conversation("q", "x1", "r", "x2"))
    assert sample.trained[1:].all()
    (sample,) = tokenizer.encode(conversation("q", "x1", "r", "x2", train=[None, False, None, None]))
    untrained = tokenizer.tokenizer.decode(sample.ids[~sample.trained])
    assert untrained == "<|im_start|><|im_start|>assistant\nx1<|im_end|>\n"
    thinking = ChatTokenizer(byte_tokenizer(FAMILIES["qwen3"][0]), "all")
    with pytest.raises(
        DataError, match="message 2 says `train: false`, but the chat template gives it no fixed place"
    ):
        thinking.encode(conversation("q", "x1", "r", "x2", train=[None, False, None, None]))


def test_messages_can_ask_not_to_be_trained() -> None:
    tokenizer = family_tokenizer("chatml")
    (sample,) = tokenizer.encode(conversation("q", "x1", "r", "x2", train=[None, False, None, None]))
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "x2<|im_end|>"
    with pytest.raises(DataError, match=r"row 7: no token of the row is trained"):
        tokenizer.encode(conversation("q", "x1", train=[None, False]), "row 7")


def test_a_conversation_that_the_assistant_opens() -> None:
    tokenizer = family_tokenizer("chatml")
    row = Conversation(
        [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Hi"}], None, [None] * 2
    )
    (sample,) = tokenizer.encode(row)
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "Welcome<|im_end|>"


def test_only_the_completion_of_a_conversational_prompt_is_trained() -> None:
    tokenizer = family_tokenizer("chatml")
    row = conversation("q", "x1", "r", "x2")
    row = Conversation(row.messages, None, row.train, completion_from=3)
    (sample,) = tokenizer.encode(row)
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "x2<|im_end|>"


def test_plain_rows_get_one_begin_and_one_end_token() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer(bos="<s>", eos="</s>", special=["<s>", "</s>"], add_bos=True))
    for text in ("two words", "<s>two words", "two words</s>"):
        (sample,) = tokenizer.encode(Text(text))
        assert tokenizer.tokenizer.decode(sample.ids) == "<s>two words</s>"
        assert sample.trained.tolist() == [False] + [True] * (len(sample.ids) - 1)
    (sample,) = tokenizer.encode(PromptCompletion("Q: ", "a bus"))
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "a bus</s>"
    with pytest.raises(DataError, match="begins with two <s> tokens"):
        tokenizer.encode(Text("<s><s>two"))
    with pytest.raises(DataError, match="row 3: the text is empty"):
        tokenizer.encode(Text(" \n"), "row 3")
    with pytest.raises(JobError, match="no end-of-text token"):
        ChatTokenizer(byte_tokenizer(eos=None)).encode(Text("x"))


def test_a_space_at_the_end_of_the_prompt_stays_there() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer())
    (sample,) = tokenizer.encode(PromptCompletion("Q: ", "a bus"))
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "a bus<|im_end|>"


def test_a_prompt_is_not_merged_with_the_first_characters_of_the_completion() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer())
    joint = tokenizer.tokenizer("Q:\n\na")["input_ids"]
    (sample,) = tokenizer.encode(PromptCompletion("Q:\n", "\na"))
    assert len(sample.ids) == len(joint) + 2  # the pair of line ends in two, and the end token
    assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "\na<|im_end|>"


def test_pieces_are_not_used_where_each_would_get_a_space_of_its_own() -> None:
    tokenizer = ChatTokenizer(space_tokenizer(""))
    (sample,) = tokenizer.encode(PromptCompletion("x ", "ab"))
    assert tokenizer.tokenizer.convert_ids_to_tokens(sample.ids) == ["▁", "x", "▁a", "b", "</s>"]
    assert sample.trained.tolist() == [False, False, False, True, True]


def test_special_tokens_that_take_in_white_space_do_not_count_as_merged() -> None:
    tokenizer = ChatTokenizer(
        byte_tokenizer(CHATML.replace("assistant\n'", "assistant<|im_start|>\n'"), right_strip=True)
    )
    template = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n{% endif %}"
    tokenizer = ChatTokenizer(byte_tokenizer(template, right_strip=True))
    row = conversation("q", "\n\nx", "r", "y")
    (sample,) = tokenizer.encode(row)
    assert [tokenizer.tokenizer.decode(sample.ids[a:b]) for a, b in trained_runs(sample)] == [
        "x<|im_end|>",
        "y<|im_end|>",
    ]


def test_a_template_without_a_turn_end_is_refused() -> None:
    tokenizer = ChatTokenizer(
        byte_tokenizer(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
    )
    with pytest.raises(
        DataError,
        match=r"t\.jsonl line 3: the chat template ends an assistant turn without a turn-end token \(with 't'\)",
    ):
        tokenizer.encode(conversation("q", "that"), "t.jsonl line 3")


def test_marks_do_not_take_the_next_turn_s_begin_for_an_end() -> None:
    template = CHATML_MARKED.replace("<|im_end|>\n{% endfor %}", "\n{% endfor %}")
    with pytest.raises(DataError, match="without a turn-end token"):
        ChatTokenizer(byte_tokenizer(template)).encode(conversation("q", "x", "r", "y"))


def test_a_turn_that_does_not_begin_as_the_generation_prompt_says_is_refused_by_name() -> None:
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    with pytest.raises(
        DataError, match=r"row 2: the chat template renders message 2 \(assistant\) differently"
    ):
        ChatTokenizer(byte_tokenizer(template)).encode(conversation("q", "x"), "row 2")


def test_what_the_template_refuses_names_the_row() -> None:
    tokenizer = family_tokenizer("gemma")
    with pytest.raises(
        DataError, match=r"row 4: the chat template refuses the conversation: System role not supported"
    ):
        tokenizer.encode(conversation("q", "x", system="s"), "row 4")


def test_a_template_may_want_more_than_a_question() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = ChatTokenizer(byte_tokenizer(template))
    row = conversation("q", "x", "r", "y", system="s")
    assert check_like_inference(tokenizer, row, tokenizer.encode(row)) == ["x<|im_end|>", "y<|im_end|>"]


def test_no_template_and_no_fast_tokenizer_are_errors_of_the_job() -> None:
    with pytest.raises(JobError, match="no chat template"):
        ChatTokenizer(byte_tokenizer(None)).encode(conversation("q", "x"))
    with pytest.raises(JobError, match="no fast version"):
        ChatTokenizer(object())


def test_one_wrong_row_of_a_batch_does_not_hide_the_others() -> None:
    tokenizer = family_tokenizer("chatml")
    good, bad = conversation("q", "x"), conversation("q")
    results = tokenizer.encode_batch([good, bad, good], ["a", "b", "c"])
    assert [isinstance(r, DataError) for r in results] == [False, True, False]
    assert results[0][0].ids.tolist() == results[2][0].ids.tolist()  # type: ignore[index,union-attr]


def test_what_closes_a_conversation_is_no_part_of_the_last_turn() -> None:
    """Phi-3 puts the end-of-text token after the last message; turns end with another one."""
    template = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    tokenizer = ChatTokenizer(
        byte_tokenizer(template, eos="</s>", special=["<|im_start|>", "<|im_end|>", "</s>"])
    )
    row = conversation("q", "x", "r", "y")
    (sample,) = tokenizer.encode(row)
    assert check_like_inference(tokenizer, row, [sample]) == ["x<|im_end|>", "y<|im_end|>"]
    only = template.replace("<|im_end|>\n' }}{% endfor", "\n' }}{% endfor")
    tokenizer = ChatTokenizer(
        byte_tokenizer(only, eos="</s>", special=["<|im_start|>", "<|im_end|>", "</s>"])
    )
    samples = tokenizer.encode(row)  # here it is the turn's only end
    assert check_like_inference(tokenizer, row, samples) == ["x\n</s>", "y\n</s>"]


def test_today_s_date_is_not_in_the_tokens() -> None:
    template = "{{ '<|im_start|>' + strftime_now('%Y-%m-%d') + '<|im_end|>' }}" + CHATML
    tokenizer = ChatTokenizer(byte_tokenizer(template))
    assert "2024-07-26" in tokenizer.tokenizer.decode(tokenizer.encode(conversation("q", "x"))[0].ids)


def test_identity_follows_what_decides_the_tokens_and_survives_pickling() -> None:
    first = ChatTokenizer(byte_tokenizer(CHATML))
    assert (
        first.identity
        == ChatTokenizer(byte_tokenizer(CHATML)).identity
        == pickle.loads(pickle.dumps(first)).identity
    )
    others = [
        ChatTokenizer(byte_tokenizer(CHATML), "all"),
        ChatTokenizer(byte_tokenizer(CHATML + " ")),
        ChatTokenizer(byte_tokenizer(CHATML, special=["<|im_end|>", "<|im_start|>"])),
        ChatTokenizer(byte_tokenizer(CHATML, bos="<|im_start|>")),
        ChatTokenizer(byte_tokenizer(CHATML, bos="<|im_start|>", add_bos=True)),
    ]
    assert len({t.identity for t in [first, *others]}) == 6


#: Real templates that cannot be trained as they are, and why.
REFUSED = {
    "deepseek_r1_distill": "differently from what its generation prompt leads to",
    "deepseekv3": "differently from what its generation prompt leads to",
    "glm4moe": "without a turn-end token",
    "idefics3": "leaves out the content",
    "llava_next": "refuses the conversation",
    "nemotron_3_5_lightning": "differently from what its generation prompt leads to",
    "nemotron_3_nano": "differently from what its generation prompt leads to",
    "nemotron_3_super": "differently from what its generation prompt leads to",
    "nemotron_3_ultra": "differently from what its generation prompt leads to",
    "smolvlm": "leaves out the content",
}

#: The same for conversations with tool calls.
TOOLS_REFUSED = REFUSED | {
    "cohere": "refuses the conversation",
    "cohere2": "refuses the conversation",
    "deepseekv3": "refuses the conversation",
    "gemma": "refuses the conversation",
    "gemma3": "refuses the conversation",
    "idefics3": "refuses the conversation",
    "lfm2": "leaves out the tool calls",
    "llama3": "leaves out the tool calls",
    "phi3": "leaves out the tool calls",
    "phi3_5": "leaves out the tool calls",
    "qwen2_5_vl": "leaves out the tool calls",
    "smolvlm": "refuses the conversation",
}

TRL_TEMPLATES = sorted(
    path
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training")
)


def tokenizer_for(path: Path) -> ChatTokenizer:
    """A tokenizer that knows the special tokens of a template."""
    template = path.read_text()
    special = {"<s>", "</s>", *re.findall(r"<\|?[\w｜▁ ]+\|?>|<\|[\w/]+\|>|\[/?[A-Z_]+\]", template)}
    return ChatTokenizer(byte_tokenizer(template, bos="<s>", eos="</s>", special=sorted(special)))


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_real_templates_are_exact_or_refused(path: Path) -> None:
    """The templates of real models that TRL ships: trained as inference sees it, or a sentence that says why not."""
    tokenizer = tokenizer_for(path)
    row = conversation("What is it?", "A bus.", "And\nthat?", "A boat, that.")
    if path.stem in REFUSED:
        with pytest.raises(DataError, match=f"row 1: .*{REFUSED[path.stem]}"):
            tokenizer.encode(row, "row 1")
        return
    answers = check_like_inference(tokenizer, row, tokenizer.encode(row))
    assert "A bus." in answers[0]
    assert "A boat, that." in answers[1]


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_tool_calls_and_what_follows_them(path: Path) -> None:
    tokenizer = tokenizer_for(path)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Xanadu"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "name": "get_weather"},
        {"role": "assistant", "content": "It rains."},
    ]
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "get_weather", "description": "Weather of a city.", "parameters": parameters}
    row = Conversation(messages, [{"type": "function", "function": tool}], [None] * 4)
    if path.stem in TOOLS_REFUSED:
        with pytest.raises(DataError, match=f"row 1: .*{TOOLS_REFUSED[path.stem]}"):
            tokenizer.encode(row, "row 1")
        return
    answers = check_like_inference(tokenizer, row, tokenizer.encode(row))
    assert "Xanadu" in answers[0]
    assert "It rains." in answers[1]
