"""The job file: pydantic models of its groups, `group.key=value` overrides, JSON schema.

`load_job(path, overrides)` is the way in; everything below it is data without behaviour. `profile` is the platform team's
counterpart, what a fleet is (`load_profile`), with `kubernetes` for names as a cluster takes them.
"""

from rayft.spec.groups import (
    Adapter,
    Checkpoint,
    Cluster,
    Data,
    Dpo,
    Log,
    Model,
    Reward,
    Source,
    Train,
    Zero,
)
from rayft.spec.job import Job
from rayft.spec.load import changed_keys, dump_job, job_schema, load_job, parse_job
from rayft.spec.measure import Eval, Suite
from rayft.spec.rl import METHODS, RewardSource, Rl, Rollout
from rayft.spec.tune import Bound, Dimension, Objective, Tune

__all__ = [
    "METHODS",
    "Adapter",
    "Bound",
    "Checkpoint",
    "Cluster",
    "Data",
    "Dimension",
    "Dpo",
    "Eval",
    "Job",
    "Log",
    "Model",
    "Objective",
    "Reward",
    "RewardSource",
    "Rl",
    "Rollout",
    "Source",
    "Suite",
    "Train",
    "Tune",
    "Zero",
    "changed_keys",
    "dump_job",
    "job_schema",
    "load_job",
    "parse_job",
]
