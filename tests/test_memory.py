"""Memory that torch frees stays with the process: seen in page faults, not in seconds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from ray_subnets.memory import keep_freed
if sys.argv[1] == "keep":
    keep_freed()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(10 << 20).fill_(1)  # 40 MB: more than glibc's threshold can be set to
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(10))
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_large_tensors_are_not_faulted_in_again() -> None:
    """By default 10 tensors of 40 MB are 10 times 10,240 pages of 4 kB."""
    assert faults("keep") < 0.02 * faults("leave")
