"""A step on a GPU does not depend on what surrounds it: streams, threads, memory, graphs, modes, changing token counts.

Every result is compared with the same step's on the default stream. Outputs and input gradients are the same bits;
the 16-bit weight gradient and the bias gradient are cuBLAS's and PyTorch's, and may differ in their last bits.
"""

import gc
import random
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import torch_switchback as ts
from torch_switchback import SwitchBackConfig

CONFIGS = [
    SwitchBackConfig(),
    SwitchBackConfig("rowwise"),
    SwitchBackConfig(mem_efficient=True),
    SwitchBackConfig("rowwise", mem_efficient=True),
    SwitchBackConfig(grad_weight="int8"),
    SwitchBackConfig("rowwise", grad_weight="int8"),
    SwitchBackConfig("rowwise", rotate_features=64),
]
SHAPES = [(512, 1024, 2048), (300, 1000, 1016), (77, 1023, 517), (4096, 1280, 5120), (33, 64, 64)]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.strategy)


def inputs_of(shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens, in_features, out_features = shape
    sizes = ((tokens, in_features), (out_features, in_features), (out_features,), (tokens, out_features))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) for size in sizes]


def step(x, weight, bias, grad, config):
    """Output, and gradients of x, weight and bias."""
    x, weight, bias = (tensor.detach().requires_grad_() for tensor in (x, weight, bias))
    y = ts.switchback_linear(x, weight, bias, config)
    y.backward(grad)
    return [y.detach(), x.grad, weight.grad, bias.grad]


def assert_same_step(actual, expected):
    for one, other in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2 * other.abs().max().item())


@pytest.fixture(scope="module")
def cases():
    """Random draws of a case: its inputs, its config, and the expected step."""
    inputs = {(shape, seed): inputs_of(shape, seed) for shape in SHAPES for seed in range(4)}
    expected = {
        (*key, number): [tensor.clone() for tensor in step(*tensors, config)]
        for key, tensors in inputs.items()
        for number, config in enumerate(CONFIGS)
    }
    torch.cuda.synchronize()

    def draw(rng):
        shape, seed, number = rng.choice(SHAPES), rng.randrange(4), rng.randrange(len(CONFIGS))
        return SimpleNamespace(
            inputs=inputs[shape, seed], config=CONFIGS[number], expected=expected[shape, seed, number]
        )

    return draw


# Memory


def test_memory_churn(cases):
    rng = random.Random(0)
    for _ in range(300):
        case = cases(rng)
        junk = [torch.full((rng.randrange(1, 4_000_000),), float("nan"), device="cuda") for _ in range(3)]
        del junk
        assert_same_step(step(*case.inputs, case.config), case.expected)


def test_a_memory_pool(cases):
    rng = random.Random(1)
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        for _ in range(60):
            case = cases(rng)
            assert_same_step(step(*case.inputs, case.config), case.expected)


def test_arguments_that_are_freed_while_the_stream_is_busy(cases):
    rng = random.Random(2)
    torch.cuda._sleep(200_000_000)
    results = []
    for _ in range(8):
        case = cases(rng)
        copies = [tensor.clone() for tensor in case.inputs]
        results.append((step(*copies, case.config), case.expected))
        del copies
        torch.full((8_000_000,), float("nan"), device="cuda")
    for actual, expected in results:
        assert_same_step(actual, expected)


@configs
def test_memory_is_flat_over_200_steps(config):
    tensors = inputs_of(SHAPES[0])
    step(*tensors, config)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        step(*tensors, config)
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 1024


@pytest.mark.parametrize("offset", range(9))
def test_storage_offsets(offset):
    """After an aligned call, whose compiled kernels an unaligned one must not use."""
    memory = torch.randn(600 * 1024 + 9, device="cuda", dtype=torch.bfloat16)
    weight = inputs_of(SHAPES[0])[1]
    ts.switchback_linear(memory[: 512 * 1024].view(512, 1024), weight)
    x = memory[offset : offset + 512 * 1024].view(512, 1024)
    y = ts.switchback_linear(x, weight)
    assert torch.equal(y, ts.switchback_linear(x.clone(), weight))
    assert torch.equal(y.cpu(), ts.switchback_linear(x.cpu(), weight.cpu()))


def test_x_that_is_its_own_weight():
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        assert torch.equal(ts.switchback_linear(x, x), ts.switchback_linear(x, x.clone()))


def test_a_grad_output_that_is_x():
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        (same,) = torch.autograd.grad(ts.switchback_linear(x, weight), x, x.detach())
        (other,) = torch.autograd.grad(ts.switchback_linear(x, weight), x, x.detach().clone())
        assert torch.equal(same, other)


# Streams and threads


def test_six_streams(cases):
    rng = random.Random(3)
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    results = []
    for _ in range(300):
        case = cases(rng)
        with torch.cuda.stream(rng.choice(streams)):
            results.append((step(*case.inputs, case.config), case.expected))
    torch.cuda.synchronize()
    for actual, expected in results:
        assert_same_step(actual, expected)


def test_eight_threads_with_streams_of_their_own(cases):
    errors = []

    def work(seed):
        rng, stream = random.Random(seed), torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                for _ in range(60):
                    case = cases(rng)
                    actual = step(*case.inputs, case.config)
                    stream.synchronize()
                    assert_same_step(actual, case.expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# Token counts


@configs
def test_token_counts_that_change_at_every_call(config):
    """Each step as a fresh process would compute it: on the CPU."""
    tokens, in_features, out_features = 400, 256, 192
    x, weight, bias, grad = inputs_of((tokens, in_features, out_features))
    on_cpu = [tensor.cpu() for tensor in (x, weight, bias, grad)]
    rng = random.Random(4)
    for _ in range(40):
        count = rng.randrange(1, tokens + 1)
        y, grad_input, *_ = step(x[:count], weight, bias, grad[:count], config)
        wanted, wanted_grad, *_ = step(on_cpu[0][:count], *on_cpu[1:3], on_cpu[3][:count], config)
        if config.rotate_features is None:  # whose sums are in the hardware's order
            assert torch.equal(y.cpu(), wanted)
            assert torch.equal(grad_input.cpu(), wanted_grad)
        else:
            torch.testing.assert_close(y.cpu(), wanted, rtol=2e-2, atol=2e-1)


# CUDA graphs


@configs
def test_a_cuda_graph_of_a_step_replayed_with_other_data(config):
    tensors = [tensor.clone() for tensor in inputs_of(SHAPES[0])]
    gc.collect()  # a graph of an earlier test, freed within a capture, would end it
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*tensors, config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*tensors, config)
    for seed in (2, 3, 1):
        others = inputs_of(SHAPES[0], seed)
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_step(captured, step(*others, config))


# Modes


class Log(TorchDispatchMode):
    """The names of the operations that PyTorch's dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@configs
def test_modes_see_the_operations_of_a_warm_step(config):
    tensors = inputs_of(SHAPES[0])
    expected = step(*tensors, config)
    with Log() as log:
        actual = step(*tensors, config)
    assert_same_step(actual, expected)
    ours = [name.split(".")[1] for name in log.names if name.startswith("torch_switchback.")]
    matmuls = [name for name in ours if name.startswith("int8_")]
    assert len(matmuls) == (3 if config.grad_weight == "int8" else 2)
    assert sum(name.startswith("quantize_") for name in ours) == (2 if config.rotate_features is None else 4)
    assert ("int8_linear" in matmuls) == (config.rotate_features is None)


def test_fake_tensors_after_warm_up():
    step(*inputs_of(SHAPES[0]), SwitchBackConfig())
    with FakeTensorMode():
        x = torch.empty(512, 1024, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(2048, 1024, device="cuda", dtype=torch.bfloat16)
        assert tuple(ts.switchback_linear(x, weight).shape) == (512, 2048)


def test_the_flop_counter_sees_a_warm_step():
    ts.ops.register_flop_formulas()
    tensors = inputs_of(SHAPES[0])
    step(*tensors, SwitchBackConfig())
    with FlopCounterMode(display=False) as counter:
        step(*tensors, SwitchBackConfig())
    tokens, in_features, out_features = SHAPES[0]
    assert counter.get_total_flops() == pytest.approx(6 * tokens * in_features * out_features, rel=0.01)


def save_matmuls(context, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "int8_linear" in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@configs
@pytest.mark.parametrize("selective", [False, True], ids=["plain", "selective"])
def test_checkpointing(config, selective):
    x, weight, bias, grad = (tensor.detach().requires_grad_() for tensor in inputs_of(SHAPES[3]))
    expected = step(x, weight, bias, grad.detach(), config)
    contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(save_matmuls)} if selective else {}
    y = checkpoint(ts.switchback_linear, x, weight, bias, config, use_reentrant=False, **contexts)
    y.backward(grad.detach())
    assert_same_step([y.detach(), x.grad, weight.grad, bias.grad], expected)


def test_the_profiler_sees_operations_and_kernels_by_name():
    tensors = inputs_of(SHAPES[3])
    expected = step(*tensors, SwitchBackConfig())
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        actual = step(*tensors, SwitchBackConfig())
        torch.cuda.synchronize()
    assert_same_step(actual, expected)
    names = {event.key for event in profiler.key_averages()}
    assert {"torch_switchback::quantize_rowwise", "torch_switchback::int8_linear"} <= names
    assert any(name.startswith("int8_matmul") for name in names)
    assert "quantize_rowwise_kernel" in names


# The length of the way


def test_at_most_seven_functions_of_ours_lie_between_the_layer_and_the_launcher():
    """docs/architecture.md lists them."""
    layer = ts.SwitchBackLinear(1024, 2048, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    stack, deepest = [], []

    def count(frame, event, argument):
        if "torch_switchback" not in frame.f_code.co_filename:
            return
        if event == "call":
            stack.append(frame.f_code.co_name)
            if frame.f_code.co_name == "launch" and len(stack) > len(deepest):
                deepest[:] = stack
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(count)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert deepest[0] == "forward" and deepest[-1] == "launch"
    assert len(deepest) <= 7, deepest
