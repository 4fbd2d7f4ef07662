"""GPUs by name: how much memory a program gets on them, and their peak bf16 matrix rate."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from rayft.errors import JobError


@dataclass(frozen=True)
class Gpu:
    """`memory_gib`: what CUDA reports as total, which is less than the name says. `tflops`: dense bf16 with fp32 sums,
    from the maker's data sheet (sparsity not counted)."""

    name: str
    memory_gib: float
    tflops: float

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * 2**30)


GPUS = [
    Gpu("A10G-24GB", 22.0, 70),
    Gpu("A10-24GB", 22.0, 125),
    Gpu("A30-24GB", 23.6, 165),
    Gpu("A40-48GB", 44.3, 150),
    Gpu("A100-40GB", 39.4, 312),
    Gpu("A100-80GB", 79.1, 312),
    Gpu("B200-180GB", 178.3, 2250),
    Gpu("GH200-96GB", 94.5, 989),
    Gpu("H100-80GB", 79.1, 989),
    Gpu("H100-PCIE-80GB", 79.1, 756),
    Gpu("H200-141GB", 139.8, 989),
    Gpu("L4-24GB", 22.0, 121),
    Gpu("L40S-48GB", 44.3, 362),
    Gpu("MI300X-192GB", 191.5, 1307),
    Gpu("RTX-3090-24GB", 23.6, 71),
    Gpu("RTX-4090-24GB", 23.6, 165),
    Gpu("RTX-5090-32GB", 31.3, 209),
    Gpu("RTX-A6000-48GB", 47.4, 155),
]


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, as people, Ray (`A100-80G`) or CUDA (`NVIDIA H100 80GB HBM3`) write it.

    Raises JobError for a name that is not known, or that is made with several memory sizes and names none.
    """
    wanted = _words(name)
    found = [gpu for gpu in GPUS if _matches(wanted, _words(gpu.name))]
    most = max((len(_words(gpu.name)) for gpu in found), default=0)
    found = [gpu for gpu in found if len(_words(gpu.name)) == most]
    if len(found) == 1:
        return found[0]
    if found:
        raise JobError(
            f"cluster.gpu {name!r} is made in several sizes.",
            f"Write {' or '.join(gpu.name for gpu in found)}.",
        )
    names = [gpu.name for gpu in GPUS]
    near = difflib.get_close_matches(name.upper(), names, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise JobError(
        f"cluster.gpu {name!r} is not known to the memory plan.", f"{hint}Known are {', '.join(names)}."
    )


def _words(name: str) -> set[str]:
    """`{'A100', '80G'}` for `A100-80GB`."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return {re.sub(r"^(\d+)GB$", r"\1G", word) for word in words if word}


def _matches(wanted: set[str], known: set[str]) -> bool:
    """Whether a name says the model, and no other memory size than the known one's."""
    sizes = {word for word in wanted if re.fullmatch(r"\d+G", word)}
    model = {word for word in known if not re.fullmatch(r"\d+G", word)}
    return model <= wanted and sizes <= known
