"""The first step of a new shape: its kernels are compiled at the same time, and none at its launch."""

import os
import subprocess
import sys

import pytest
import torch

FIRST_STEP = """
import torch, triton
import torch_switchback as ts

compiled = []

def note(*, fn, is_manual_warmup, **_):
    compiled.append((fn.name.rpartition(".")[2], is_manual_warmup))

triton.knobs.runtime.jit_post_compile_hook = note
layer = ts.SwitchBackLinear(272, 208, device="cuda", dtype=torch.bfloat16)
x = torch.randn(600, 272, device="cuda", dtype=torch.bfloat16, requires_grad=True)
grad = torch.randn(600, 208, device="cuda", dtype=torch.bfloat16)

def step():
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)

first = step()
assert len({name for name, _ in compiled}) >= 5, compiled
assert all(is_rehearsed for _, is_rehearsed in compiled), compiled
compiled.clear()
for _ in range(2):
    assert all(torch.equal(one, other) for one, other in zip(first, step(), strict=True))
assert not compiled, compiled
"""


@pytest.mark.parametrize("device", ["0", pytest.param("1", id="another than the current one")])
def test_kernels_are_compiled_before_the_first_is_launched(device, tmp_path):
    if int(device) >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    code = FIRST_STEP.replace('"cuda"', f'"cuda:{device}"')
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
