"""Memory, size limits, CUDA graphs and devices: what only a GPU can show."""

import copy
import gc

import pytest
import torch
from torch import nn
from triton import knobs

import torch_switchback as ts
from testing import STRATEGIES, make_layer
from torch_switchback import SwitchBackConfig, ops
from torch_switchback.ops._hadamard import rotate

strategies = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)


def peak_of_a_step(config):
    """Bytes above what was there before: a chain of layers, none of whose activations another operation keeps."""
    layers = [nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    model = nn.Sequential(*layers)
    if config is not None:
        ts.convert_to_switchback(model, config=config)
    x = torch.randn(16_384, 1024, device="cuda", dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_mem_efficient_halves_the_activations_kept():
    plain = peak_of_a_step(None)
    assert peak_of_a_step(SwitchBackConfig()) < 1.15 * plain
    for scaling in ("global", "rowwise"):
        # 15 activations kept in 8 bit instead of 16, and a few alive in between.
        assert peak_of_a_step(SwitchBackConfig(scaling, mem_efficient=True)) < 0.70 * plain


def test_memory_is_flat_over_steps():
    layer = ts.SwitchBackLinear(512, 512, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    allocated = []
    for _ in range(6):
        layer.zero_grad()
        layer(x).sum().backward()
        allocated.append(torch.cuda.memory_allocated())
    assert len(set(allocated[2:])) == 1


@strategies
def test_cuda_graph_after_warm_up(config, monkeypatch):
    layer = make_layer(config, 256, 128, "cuda", torch.bfloat16)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(512, 128, device="cuda", dtype=torch.bfloat16)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)

    gc.collect()  # a graph of an earlier test, freed within a capture, would end it
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert not compiled
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.weight.copy_(torch.randn_like(layer.weight))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@strategies
def test_graphed_callable(config):
    """PyTorch's remedy for layers that are too small for the host: a graph for the forward, one for the backward."""
    layer = make_layer(config, 256, 128, "cuda", torch.bfloat16)
    example = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gc.collect()  # as above
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (example,))
    for _ in range(2):
        x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(512, 128, device="cuda", dtype=torch.bfloat16)
        steps = [(y := each(x), *torch.autograd.grad(y, (x, *each.parameters()), grad)) for each in (layer, graphed)]
        for expected, actual in zip(*steps, strict=True):
            assert torch.equal(actual, expected)
        with torch.no_grad():
            for each in (layer, graphed):  # in place, as optimizers do
                each.weight.mul_(1.5)


def test_more_than_two_to_the_31_elements():
    rows, cols = 70_000, 32_768
    assert rows * cols > 2**31
    x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    tail = slice(rows - 64, rows)
    qdata, absmax = ts.ops.quantize_rowwise(x)
    for actual, expected in zip((qdata[tail], absmax[tail]), ts.ops.quantize_rowwise(x[tail].cpu()), strict=True):
        assert torch.equal(actual.cpu(), expected)
    del qdata
    x[-1, -1] = 100.0
    qdata, absmax = ts.ops.quantize_global(x)
    assert absmax.item() == 100.0
    inverse = torch.tensor(127.0) / torch.tensor(100.0)
    expected = (x[tail].cpu().float() * inverse).round().to(torch.int8)
    assert torch.equal(qdata[tail].cpu(), expected)
    del qdata
    qdata, absmax = ts.ops.quantize_global_transpose(x)
    assert absmax.item() == 100.0
    assert torch.equal(qdata[:, tail].t().cpu(), expected)
    del qdata
    qdata, absmax = ts.ops.quantize_columnwise_and_transpose(x)
    assert absmax[-1].item() == 100.0
    assert qdata[-1, -1].item() == 127
    del qdata
    *_, qdata, absmax = ops.quantize_rowwise_and_rotated_columnwise(x, 64)
    last = rows // 64 * 64
    padded = nn.functional.pad(x[last:].cpu().float(), (0, 0, 0, last + 64 - rows))
    assert torch.equal(qdata[:, last:].t().cpu(), ops.quantize_by_absmax(rotate(padded, 64).t(), absmax.cpu()).t())


def test_more_than_two_to_the_31_int8_values():
    rows, cols = 70_000, 32_768
    x = torch.randint(-127, 128, (rows, cols), device="cuda", dtype=torch.int8)
    absmax = torch.rand(rows, device="cuda")
    out = ts.ops.dequantize_rowwise(x, absmax, torch.bfloat16)
    assert torch.equal(out[-64:].cpu(), ts.ops.dequantize_rowwise(x[-64:].cpu(), absmax[-64:].cpu(), torch.bfloat16))


def test_a_product_of_more_than_two_to_the_31_elements():
    a = torch.randint(-127, 128, (70_000, 64), device="cuda", dtype=torch.int8)
    b = torch.randint(-127, 128, (32_768, 64), device="cuda", dtype=torch.int8)
    absmax = torch.rand(70_000, device="cuda")
    out = ts.ops.int8_matmul_mixed_dequantize(a, b.t(), absmax, absmax[:1], None)
    on_cpu = a[-64:].cpu(), b.t().cpu(), absmax[-64:].cpu(), absmax[:1].cpu()
    expected = ts.ops.int8_matmul_mixed_dequantize(*on_cpu, None)
    assert torch.equal(out[-64:].cpu(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@strategies
def test_a_device_that_is_not_the_current_one(config):
    layer = make_layer(config, 64, 48, "cuda:1", torch.bfloat16)
    x = torch.randn(33, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert torch.cuda.current_device() == 0
    assert torch.equal(layer(x).cpu(), layer.cpu()(x.cpu()))


def test_tensors_on_two_devices_are_refused():
    layer = ts.SwitchBackLinear(6, 4)
    with pytest.raises(ValueError, match="weight is on cpu, the input on cuda:0"):
        layer(torch.randn(2, 6, device="cuda"))
