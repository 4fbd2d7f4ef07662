"""`rayft chat`: one shot, a conversation, adapters beside their base, characters of several tokens."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rayft.errors import DataError, JobError
from rayft.generate.chat import Conversation, chat, pieces
from rayft.generate.hf import TransformersEngine
from rayft.generate.load import load_model
from rayft.model.adapter_info import adapter_folder
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed, line by line; then the input ends."""
    lines: list[str] = []

    def read(_: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr(builtins, "input", read)
    return lines


def conversation(**settings: object) -> Conversation:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return Conversation(TransformersEngine(model, tokenizer), tokenizer, **settings)  # type: ignore[arg-type]


def test_one_shot_prints_the_answer_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(str(folder), prompt="hi", system="be brief", max_new_tokens=8) == 0
    model, tokenizer = load_model(str(folder))
    talk = Conversation(TransformersEngine(model, tokenizer), tokenizer, system="be brief", max_new_tokens=8)
    assert capsys.readouterr().out == "".join(talk.ask("hi")) + "\n"


def test_a_conversation_goes_on_until_the_input_ends(
    folder: Path, typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["hi", "/new", "hi"]
    assert chat(str(folder), max_new_tokens=6) == 0
    typed += ["hi", "hi", "/exit", "never read"]
    assert chat(str(folder), max_new_tokens=6) == 0
    assert typed == ["never read"]
    assert "/exit ends" in capsys.readouterr().out


def test_answers_become_part_of_the_conversation() -> None:
    talk = conversation(system="s", max_new_tokens=5)
    first = "".join(talk.ask("one"))
    "".join(talk.ask("two"))
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[2]["content"] == first
    talk.forget()
    assert talk.messages == [{"role": "system", "content": "s"}]


def test_an_answer_stopped_half_way_is_kept_as_far_as_it_came() -> None:
    talk = conversation(max_new_tokens=5)
    answer = talk.ask("one")
    piece = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": piece}
    assert talk.engine.config._attn_implementation == "eager"


def test_the_oldest_exchanges_go_when_the_context_is_full() -> None:
    talk = conversation(system="s", max_new_tokens=8)
    for _ in range(6):
        "".join(talk.ask("x" * 120))
    assert talk.messages[0]["role"] == "system"
    assert len(talk.messages) < 13
    with pytest.raises(DataError, match="context is 512"):
        "".join(talk.ask("x" * 600))


def test_pieces_never_show_half_a_character() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("aé日b")["input_ids"]
    assert len(ids) == 7
    assert [piece for piece in pieces(tokenizer, ids) if piece] == ["a", "é", "日", "b"]
    assert "".join(pieces(tokenizer, ids[:-2])) == "aé\N{REPLACEMENT CHARACTER}"


def test_an_adapter_is_loaded_upon_its_base(folder: Path, tmp_path: Path) -> None:
    base, _ = load_model(str(folder), dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "model", save_embedding_layers=False)
    loaded, tokenizer = load_model(str(tmp_path), dtype=torch.float32)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        assert not torch.allclose(tiny_model()(ids).logits, expected, atol=1e-3)
    engine = TransformersEngine(loaded, tokenizer)
    base.set_attn_implementation("sdpa")  # transformers' own generation pads on the left
    whole = adapted.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=256)
    engine.stop_ids = frozenset()
    assert engine.generate(ids.tolist(), max_new_tokens=5) == whole[:, ids.shape[1] :].tolist()


def test_adapters_that_cannot_be_loaded(tmp_path: Path) -> None:
    assert adapter_folder(str(tmp_path), tmp_path) is None
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(JobError, match="does not name the adapter's base model"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/model"}')
    with pytest.raises(JobError, match="no model at /nowhere/model"):
        load_model(str(tmp_path))


def test_tokens_stream_as_they_are_generated() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    stream: Iterator[int] = engine.stream([40, 41], max_new_tokens=6)
    first = next(stream)
    whole = engine.generate([[40, 41]], max_new_tokens=6)[0]
    assert [first, *stream] == [token for token in whole if token not in engine.stop_ids]
