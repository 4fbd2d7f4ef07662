"""Building a model: every family gets exactly its weights, whole or tensor by tensor, or a refusal that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rayft.errors import JobError
from rayft.model import ModelFiles, resolve_model
from rayft.model.load import assign, build_empty, build_model, enable_gradient_checkpointing, restore_buffers
from rayft.model.weights import Weights, skeleton, stream_weights
from rayft.spec import Model
from tests.tiny import FAMILIES, save_tiny, tiny_config

INPUT_IDS = torch.arange(24).view(1, 24)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(path: Path, **values: Any) -> Model:
    return Model.model_validate({"path": str(path), **values})


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., ModelFiles]:
    return lambda path, **values: resolve_model(model(path, **values), tmp_path / "cache")


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_built_model_equals_from_pretrained(
    family: str, dtype: torch.dtype, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a", family)
    built = build_model(resolve(path), model(path), dtype=dtype, attention="eager")
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    for name, tensor in state(reference).items():
        assert torch.equal(state(built)[name], tensor), name
        assert state(built)[name].dtype == tensor.dtype, name
    with torch.no_grad():
        assert torch.equal(built(INPUT_IDS).logits, reference(INPUT_IDS).logits)
    assert built.generation_config == reference.generation_config
    assert not built.training


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_weights_fill_an_empty_model(
    family: str, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a", family)
    files = resolve(path)
    empty = build_empty(files, model(path), dtype=torch.float32, attention="eager")
    for _, parameter in empty.named_parameters():
        nn.init.constant_(parameter, float("nan"))
    streamed = dict(stream_weights(files, model(path)))
    for name, tensor in streamed.items():
        assign(empty, name, tensor)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(empty(INPUT_IDS).logits, reference(INPUT_IDS).logits)
    assert list(streamed) == [name for name, _ in empty.named_parameters()], "tied weights come once"
    for name, tensor in stream_weights(files, model(path), read=False):
        assert tensor.is_meta
        assert tensor.shape == streamed[name].shape


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_random_weights_follow_from_the_config_alone(
    family: str, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    tiny_config(family).save_pretrained(tmp_path / "a")
    files, spec = resolve(tmp_path / "a", random_weights=True), model(tmp_path / "a", random_weights=True)
    torch.manual_seed(1)
    built = build_model(files, spec, dtype=torch.float32, attention="eager")
    torch.manual_seed(2)
    for name, tensor in stream_weights(files, spec):
        assert torch.equal(built.get_parameter(name), tensor), name
    reference = AutoModelForCausalLM.from_config(tiny_config(family))
    for name, parameter in reference.named_parameters():
        ours = built.get_parameter(name)
        assert ours.mean().item() == pytest.approx(parameter.mean().item(), abs=0.03), name
        assert ours.std().item() == pytest.approx(parameter.std().item(), abs=0.03), name


def test_reading_touches_only_the_tensor_asked_for(
    tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a", "llama", num_hidden_layers=4)
    from transformers import AutoModelForCausalLM as Auto

    Auto.from_pretrained(path).save_pretrained(tmp_path / "b", max_shard_size="30KB")
    files = resolve(tmp_path / "b")
    assert len(files.weights) > 3
    weights = Weights(files, skeleton(files, model(tmp_path / "b")))
    weights.read("model.layers.2.mlp.up_proj.weight")
    assert len(weights._mapped) == 1


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (edit_weights(lambda t: t.pop(UP)), rf"lack {UP}"),
        (edit_weights(lambda t: t.update({"score.weight": torch.ones(1)})), r"hold score\.weight.*no place"),
        (edit_weights(lambda t: t.update({UP: torch.ones(3, 4)})), rf"{UP} of shape \(3, 4\).*\(48, 32\)"),
        (edit_weights(lambda t: t.update({UP: torch.ones(48, 32).to(torch.float8_e4m3fn)})), "F8_E4M3"),
        (edit_config(tie_word_embeddings=True), r"ties lm_head\.weight.*weights differ"),
        (edit_config(model_type="made_up"), "config of .* cannot be used.*made_up"),
        (edit_config(model_type="t5"), "cannot be built"),
        (truncate, r"model\.safetensors cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    edit: Callable[[Path], None], says: str, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a")
    edit(path)
    with pytest.raises(JobError, match=says):
        build_model(resolve(path), model(path), dtype=torch.float32, attention="eager")


def test_either_end_of_a_tie_may_be_in_the_file(tmp_path: Path, resolve: Callable[..., ModelFiles]) -> None:
    path = save_tiny(tmp_path / "a", "qwen3")
    expected = dict(stream_weights(resolve(path), model(path)))
    edit_weights(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))(path)
    built = build_model(resolve(path), model(path), dtype=torch.float32, attention="eager")
    assert torch.equal(built.model.embed_tokens.weight, expected["model.embed_tokens.weight"])
    assert built.lm_head.weight is built.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_restored_to_fp32(
    family: str, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a", family)
    built = build_model(resolve(path), model(path), dtype=torch.bfloat16, attention="eager")
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in state(built).items()}
    assert any("inv_freq" in name for name in before)
    wrapped = nn.Module()
    wrapped.model = built.bfloat16()
    restore_buffers(wrapped)
    for name, tensor in state(built).items():
        assert tensor.dtype == before[name][0], name
        assert torch.equal(tensor, before[name][1]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(
    reentrant: bool, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        built = build_model(resolve(path), model(path), dtype=torch.float32, attention="eager")
        built.requires_grad_(False)
        for layer in built.model.layers:
            layer.mlp.up_proj.requires_grad_(True)  # as with LoRA: nothing before the first layer is trained
        if checkpointing:
            enable_gradient_checkpointing(built, reentrant=reentrant)
        built.train()
        built(INPUT_IDS, use_cache=False).logits.square().sum().backward()
        return {name: p.grad for name, p in built.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 2
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_an_attention_that_is_not_installed_is_refused(
    tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = save_tiny(tmp_path / "a")
    with pytest.raises(JobError, match="flash_attention_2"):
        build_model(resolve(path), model(path), dtype=torch.bfloat16, attention="flash_attention_2")
