"""The groups of what is measured: on held-out rows, and by suites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from rayft.spec.groups import Group


class Suite(Group):
    """One measured quality of the model."""

    name: str = Field(description="What it is called in reports and metrics.")
    type: Literal["bits_per_byte", "multiple_choice", "json", "qa", "ifeval", "preference"] = Field(
        description="json: generated JSON against the reference; qa: F1, exact match and right refusals; ifeval: "
        "verifiable instructions; preference: whether the model agrees with people about answers."
    )
    path: str = Field(description="Its rows: file, local or s3://, as in data.")
    limit: PositiveInt | None = Field(None, description="Use only the first so many rows.")
    max_new_tokens: PositiveInt = Field(
        128, description="Suites whose answers are generated (json, qa, ifeval): tokens of an answer at most."
    )
    schema_path: str | None = Field(
        None,
        description="File, local or s3://, with a JSON schema that answers of a `json` suite must satisfy.",
    )
    refusal: str | None = Field(
        None, description="`qa`: the exact sentence that says the context holds no answer."
    )
    by: str | None = Field(
        None, description="`preference`: a column by whose values the accuracy is also given (source, rater)."
    )
    forgetting: bool = Field(False, description="This suite measures what should not get worse.")


class Eval(Group):
    """What is measured: on data.eval during the run, suites before and after it."""

    every_steps: PositiveInt | None = Field(
        None, description="Steps between measurements on data.eval during the run (default: none)."
    )
    batch_size: PositiveInt = Field(16, description="Rows scored or generated at a time by a rank.")
    suites: list[Suite] = Field(default_factory=list)
    before: bool = Field(
        True,
        description="Measure the suites before training too, and held-out rewards, without which there is no win rate.",
    )
    answers: PositiveInt = Field(
        1, description="Methods that learn from rewards: answers to each prompt of data.eval."
    )

    @field_validator("suites")
    @classmethod
    def _unique_names(cls, suites: list[Suite]) -> list[Suite]:
        names = [s.name for s in suites]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two suites are named {name!r}")
        return suites
