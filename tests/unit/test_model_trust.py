"""Code that a model brings runs only where the job says so of that very model; what is pickled never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.errors import JobError
from rayft.model import load_config, resolve_model
from rayft.rlhf.plan import critic_job
from rayft.spec import Job, Model, parse_job
from tests.tiny import save_tiny, tiny_tokenizer

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({ran!r}).touch()
class OddConfig(PretrainedConfig):
    model_type = "odd"
"""


def bring_code(folder: Path, ran: Path) -> Path:
    """Have the model in the folder bring a config class, which leaves `ran` behind where it is imported."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(CODE.format(ran=str(ran)))
    return folder


def refuse_more_than_a_sentence(error: JobError) -> None:
    assert "\n" not in str(error)
    assert error.remedy


def test_a_models_own_code_runs_where_the_job_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    folder = bring_code(save_tiny(tmp_path / "model"), ran)
    untrusted = Model(path=str(folder))
    files = resolve_model(untrusted, tmp_path / "cache")
    with pytest.raises(JobError, match=r"cannot be used.*trust_remote_code") as caught:
        load_config(files, untrusted)
    refuse_more_than_a_sentence(caught.value)
    assert not ran.exists()
    assert load_config(files, Model(path=str(folder), trust_remote_code=True)).model_type == "odd"
    assert ran.exists()


class Harm:
    """Runs code where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("brings", ["a pickled object", "code"])
def test_pickled_weights_run_nothing(tmp_path: Path, brings: str) -> None:
    """Whatever the job trusts: `model.trust_remote_code` speaks of code, which nobody needs to read weights."""
    ran = tmp_path / "ran"
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harm(ran)} if brings == "a pickled object" else {}, folder / "pytorch_model.bin")
    if brings == "code":
        bring_code(folder, ran)
    with pytest.raises(JobError, match="transformers cannot read the model") as caught:
        resolve_model(Model(path=str(folder), trust_remote_code=True), tmp_path / "cache")
    refuse_more_than_a_sentence(caught.value)
    assert not ran.exists()


def ppo(policy: Path, judge: Path) -> Job:
    return parse_job(
        {
            "name": "x",
            "method": "ppo",
            "model": {"path": str(policy), "trust_remote_code": True, "revision": "main"},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64},
            "rewards": [{"name": "liked", "type": "model", "path": str(judge)}],
            "rollout": {"max_new_tokens": 8},
        }
    )


def test_what_the_policy_may_do_its_reward_model_may_not(tmp_path: Path) -> None:
    policy = save_tiny(tmp_path / "policy")
    judge = save_tiny(tmp_path / "judge")
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": "score"}, "label2id": {"score": 0}})
    )
    tokenizer = tiny_tokenizer()
    made = critic_job(ppo(policy, judge), tokenizer, tmp_path / "cache", print)
    assert (made.model.path, made.model.trust_remote_code) == (str(judge), False)
    bring_code(judge, tmp_path / "ran")
    with pytest.raises(JobError, match=r"cannot be used.*trust_remote_code"):
        critic_job(ppo(policy, judge), tokenizer, tmp_path / "cache", print)
    assert not (tmp_path / "ran").exists()
