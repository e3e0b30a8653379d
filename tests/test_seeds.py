"""The documents that the library satisfies to the letter: their imports and usage examples, line by line.

Run as bitsandbytes' own names, with bitsandbytes installed or not (``make test`` does both).
"""

import pytest
import torch

import torch_switchback

LAYER_IMPORTS = """
from bitsandbytes.nn import SwitchBackLinear
# Or specific variants:
from bitsandbytes.nn.triton_based_modules import (
SwitchBackLinearGlobal,
SwitchBackLinearGlobalMemEfficient,
SwitchBackLinearVectorwise,
)
"""

LAYER_USAGE = """
import torch
from bitsandbytes.nn import SwitchBackLinear
# Replace nn.Linear with SwitchBackLinear
layer = SwitchBackLinear(768, 3072, bias=True).cuda()
x = torch.randn(32, 128, 768, device="cuda", dtype=torch.float16)
output = layer(x) # INT8 quantized matmul via Triton
output.sum().backward()
"""

INFERENCE_USAGE = """
# Pre-quantize weights for faster inference
layer.eval()
layer.prepare_for_eval()
# Now forward uses pre-computed INT8 weights
with torch.no_grad():
    output = layer(x)
"""

QUANTIZE_USAGE = """
import torch
from bitsandbytes.triton.quantize_global import quantize_global, quantize_global_transpose
W = torch.randn(768, 3072, device="cuda", dtype=torch.float16)
# Global quantize (preserves shape)
W_int8, absmax = quantize_global(W)
# W_int8.shape = (768, 3072), dtype=int8
# Global quantize + transpose
W_int8_t, absmax = quantize_global_transpose(W)
# W_int8_t.shape = (3072, 768), dtype=int8
"""


@pytest.fixture(autouse=True)
def _installed():
    torch_switchback.install_as_bitsandbytes()


def run(device, *examples):
    names = {}
    for example in examples:
        if device == "cpu":
            example = example.replace(".cuda()", "").replace(', device="cuda"', "")
            example = example.replace("randn(32, ", "randn(2, ")  # the float16 matmuls of 32 take 20 s
            assert "cuda" not in example
        exec(example, names)
    return names


def test_layer_imports(device):
    names = run(device, LAYER_IMPORTS)
    assert issubclass(names["SwitchBackLinear"], torch_switchback.SwitchBackLinear)
    for variant in ("SwitchBackLinearGlobal", "SwitchBackLinearGlobalMemEfficient", "SwitchBackLinearVectorwise"):
        assert names[variant].func is names["SwitchBackLinear"]
        assert names[variant].keywords == getattr(torch_switchback.nn, variant).keywords


def test_layer_usage(device):
    names = run(device, LAYER_USAGE)
    assert names["output"].shape == (len(names["x"]), 128, 3072)
    assert names["output"].dtype == torch.float16
    assert names["layer"].weight.grad.shape == (3072, 768)


def test_inference_usage(device):
    names = run(device, LAYER_USAGE, INFERENCE_USAGE)
    assert names["layer"].is_prepared
    assert names["output"].shape == (len(names["x"]), 128, 3072)


def test_quantize_usage(device):
    names = run(device, QUANTIZE_USAGE)
    assert (names["W_int8"].shape, names["W_int8"].dtype) == ((768, 3072), torch.int8)
    assert (names["W_int8_t"].shape, names["W_int8_t"].dtype) == ((3072, 768), torch.int8)
    assert names["absmax"].shape == (1,)
