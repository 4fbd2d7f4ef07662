"""How far numbers go: what is exponentiated, and the KL of one token."""

from __future__ import annotations

from typing import Literal

Estimator = Literal["k1", "k2", "k3"]

#: Bounds of what is exponentiated, and of k3: beyond them a token is as far off as numbers go.
LOG_RATIO_BOUND = 20.0
K3_BOUND = 10.0
