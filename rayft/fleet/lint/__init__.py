"""What in a manifest loses work or money, or will be refused: `lint(documents)` and `rayft k8s lint`.

A rule is a small function in `rules/`, found by its id, with its reason and its source. `schema.py` checks structure and
`cel.py` the expressions that schemas carry; `core.py` the kinds of Kubernetes itself.
"""

from rayft.fleet.lint.findings import Finding, Report
from rayft.fleet.lint.run import lint

__all__ = ["Finding", "Report", "lint"]
