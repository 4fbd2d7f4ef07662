"""What Ray's job server says of the submission that this driver belongs to."""

from __future__ import annotations

import json
import os
from typing import Any

#: Where it puts what a job was submitted with, and its own name for it (Ray `dashboard/modules/job/job_supervisor.py`).
SUBMITTED_WITH = "RAY_JOB_CONFIG_JSON_ENV_VAR"
SUBMISSION = "job_submission_id"


def metadata_of_submission() -> dict[str, Any]:
    """Metadata of the submission, its id under `job_submission_id`; empty for a driver that nobody submitted."""
    try:
        found = json.loads(os.environ.get(SUBMITTED_WITH, "{}")).get("metadata")
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
