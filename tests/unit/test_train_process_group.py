"""What Ray Train's controller is given can be unpickled without torch."""

from __future__ import annotations

import subprocess
import sys

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from rayft.train.process_group import ProcessGroup, Trainer
from tests.runs import ROOT

#: Rooms of what the controller gets, beside the plan: backend, callbacks, failure budget, entry point of the workers.
OF_THE_CONTROLLER = ("process_group", "placing", "waiting", "budget", "group")


def test_the_controller_imports_no_torch() -> None:
    names = ", ".join(f"rayft.train.{name}" for name in OF_THE_CONTROLLER)
    program = (
        f"import sys, {names}\nprint(*sorted({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert done.stdout.split() == []


def test_no_actor_for_data_sets_or_cleaning_is_started() -> None:
    trainer = Trainer(print, backend_config=ProcessGroup("gloo", 60))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert kinds
    assert not kinds & {DatasetsCallback, PlacementGroupCleanerCallback}
