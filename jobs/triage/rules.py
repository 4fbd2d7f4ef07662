"""The triage record: its fields, its enumerations and the house rules that derive one field from others."""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = ("billing", "delivery", "defect", "access", "setup")
PLANS = ("premium", "standard", "basic")
IMPACTS = ("all", "some", "one")
PRIORITIES = ("urgent", "high", "normal", "low")
LINES = ("network", "print", "video")
TEAMS = ("security", "finance", "logistics", *LINES)

ORDER_PATTERN = "^[A-Z]-[0-9]{4}$"


@dataclass(frozen=True)
class Facts:
    """What a ticket says. `plan` is None where the customer names none; `refund` is the amount of money asked for, None without."""

    order: str
    product: str
    line: str
    category: str
    plan: str | None
    impact: str
    refund: int | None
    security: bool

    @property
    def brand(self) -> str:
        """First word of the product's name; a brand belongs to one split."""
        return self.product.split()[0]

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """The tuple whose test values never occur in train: product line, category, plan, impact."""
        return self.line, self.category, self.plan or "basic", self.impact


def record(facts: Facts) -> dict[str, str | int]:
    """The triage record of a ticket, by the house rules below; fields in the order in which they are written.

    1. `order` and `product` are copied to the letter.
    2. A customer who names no plan is on `basic`.
    3. `priority`: what stops everybody is urgent; else a premium customer is high; else some is normal and one is low.
    4. `refund` is the amount of money asked back as a whole number, 0 where nobody asks for any.
    5. `team`: any sign of an intrusion goes to security, whatever else the ticket is about; then billing goes to finance,
       delivery to logistics, and everything else to the team of the product's line.
    """
    plan = facts.plan or "basic"
    return {
        "order": facts.order,
        "product": facts.product,
        "category": facts.category,
        "refund": facts.refund or 0,
        "plan": plan,
        "impact": facts.impact,
        "priority": _priority(plan, facts.impact),
        "team": _team(facts),
    }


def _priority(plan: str, impact: str) -> str:
    if impact != "all" and plan == "premium":
        return "high"
    return {"all": "urgent", "some": "normal", "one": "low"}[impact]


def _team(facts: Facts) -> str:
    if facts.security:
        return "security"
    return {"billing": "finance", "delivery": "logistics"}.get(facts.category, facts.line)


def schema() -> dict[str, object]:
    """JSON Schema (2020-12) of the record: every field required, nothing else allowed."""
    fields: dict[str, dict[str, object]] = {
        "order": {"type": "string", "pattern": ORDER_PATTERN},
        "product": {"type": "string", "minLength": 1},
        "category": {"enum": list(CATEGORIES)},
        "refund": {"type": "integer", "minimum": 0},
        "plan": {"enum": list(PLANS)},
        "impact": {"enum": list(IMPACTS)},
        "priority": {"enum": list(PRIORITIES)},
        "team": {"enum": list(TEAMS)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Triage record of a support ticket",
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
