"""Reading a checkpoint holds what was asked for and little else, though its files are mapped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rayft.checkpoint import CheckpointWriter, Fragment
from rayft.storage import LocalStore
from tests.shared import ROOT

SIZE = 64_000_000  # float32 elements, 256 MB

READER = """
import sys
from pathlib import Path
from rayft.checkpoint import CheckpointReader, latest
from rayft.storage import LocalStore

def peak():
    # Not getrusage: its figure starts from that of the process which forked this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

store = LocalStore(sys.argv[1])
before = peak()
assert latest(store) == 1  # verifies every checksum
reader = CheckpointReader(store, 1)
for offset in range(0, 64_000_000, 4_000_000):
    assert reader.read("weight", "param", offset, 4_000_000)[-1] == offset // 4_000_000
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_mapped_pages_are_given_back(tmp_path: Path) -> None:
    data = np.repeat(np.arange(16, dtype=np.float32), SIZE // 16)
    writer = CheckpointWriter(LocalStore(tmp_path), 0, 0, 1, background=False)
    writer.save(1, [Fragment("weight", "param", (SIZE,), "float32", 0, data)], {})
    command = [sys.executable, "-c", READER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < data.nbytes / 2
