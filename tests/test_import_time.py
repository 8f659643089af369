"""Importing kizzasi costs little more than importing torch."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), set(sys.modules)
import {module}
end = time.process_time()
late = set(sys.modules) - before
new = {{n if n.startswith("torch.") else n.partition(".")[0] for n in late}}
print((end - start) / (middle - start), *sorted(new - {{"kizzasi"}}))
"""
# What core code may load at import, and torch's own modules that torch itself leaves for later:
# its compiler, say, takes longer than all the rest.
LIGHT = {"einops", "numpy", "safetensors"}
# Where an op registers how its work is counted; 1.5 ms.
LIGHT |= {"torch.utils.flop_counter", "torch.utils.module_tracker"}


@pytest.mark.parametrize("module", ["kizzasi", "kizzasi.models"])
def test_import_takes_at_most_a_fifth_longer_than_that_of_torch(module):
    ratios = []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(4):  # the first run may have to compile, and others may use the machine
        command = [sys.executable, "-c", SCRIPT.format(module=module)]
        ratio, *new = subprocess.check_output(command, text=True, env=environment).split()
        assert set(new) <= LIGHT
        ratios.append(float(ratio))
        if ratios[-1] <= 1.2:
            break
    print(f"import {module} takes {min(ratios):.3f} times as long as import torch")
    assert min(ratios) <= 1.2
