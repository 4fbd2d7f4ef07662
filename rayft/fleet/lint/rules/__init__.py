"""The rules, by subject. Importing this package registers them all."""

from rayft.fleet.lint.rules import (  # noqa: F401
    drain,
    images,
    kueue,
    kueue_queues,
    money,
    names,
    operator_cluster,
    operator_features,
    operator_job,
    references,
    resources,
    secrets,
    security,
)
