"""Files of a reward function that travel with a job: its own, and what it may import from beside it."""

from __future__ import annotations

from pathlib import Path


def files_of_function(path: str, here: Path) -> list[Path]:
    """Of `file.py:name` or `module:name` as a job names it, its own file first; none of a module that is not below `here`, which
    is one that is installed. A file of the first form is named whether it is there or not."""
    where = path.rpartition(":")[0]
    if where.endswith(".py"):
        file, packages = Path(where).expanduser(), []
    else:
        parts = where.split(".")
        base = Path(*parts)
        found = [one for one in (base.with_suffix(".py"), base / "__init__.py") if (here / one).is_file()]
        if not found:
            return []
        file = found[0]
        parents = [Path(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]
        packages = [one for one in parents if (here / one).is_file()]
    beside = sorted((here / file).parent.glob("*.py")) if (here / file).is_file() else []
    return list(dict.fromkeys([file, *packages, *(file.parent / one.name for one in beside)]))
