"""Tensor parallelism: column- and row-parallel layers, alone and under fully_shard on a 2-D mesh."""

import pytest
import torch
import torch.distributed as dist
from dist_utils import in_processes
from models import assert_close, batch, converted, loss_of, mlp, sgd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

import torch_switchback as ts
from testing import convert_all
from torch_switchback.analysis.monitor import Monitor
from torch_switchback.distributed import precompute_absmax_for_fsdp

SCALINGS = ["global", "rowwise"]
STRATEGIES = [(scaling, mem_efficient) for scaling in SCALINGS for mem_efficient in (False, True)]


def tensor_parallel():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def column_parallel(layer, **layouts):
    return parallelize_module(layer, tensor_parallel(), ColwiseParallel(**layouts))


def row_parallel(layer, **layouts):
    return parallelize_module(layer, tensor_parallel(), RowwiseParallel(**layouts))


def check_gradients(model, alone):
    for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
        if actual.shape[-1] % 2 == 0:  # torch 2.11 gathers the gradient of a weight whose columns are cut unevenly
            assert actual.grad.placements == actual.placements
        assert_close(actual.grad.full_tensor(), expected.grad)


@pytest.mark.parametrize("features", [16, 13], ids=["even", "uneven"])
@pytest.mark.parametrize(("scaling", "mem_efficient"), STRATEGIES)
@in_processes(2)
def test_column_parallel(scaling, mem_efficient, features):
    """The output is one process's bit for bit: its int8 values are, and no sum is spread over ranks."""
    config = {"weight_scaling": scaling, "mem_efficient": mem_efficient}
    alone, layer = (converted(nn.Linear(20, features), **config) for _ in range(2))
    layer.load_state_dict(alone.state_dict())
    column_parallel(layer, output_layouts=Replicate())
    x, same_x = batch().requires_grad_(), batch().requires_grad_()
    y, expected = layer(x), alone(same_x)
    assert torch.equal(y, expected)
    loss_of(y).backward()
    loss_of(expected).backward()
    assert_close(x.grad, same_x.grad)
    check_gradients(layer, alone)


@pytest.mark.parametrize("features", [20, 13], ids=["even", "uneven"])
@pytest.mark.parametrize(("scaling", "mem_efficient"), STRATEGIES)
@in_processes(2)
def test_row_parallel(scaling, mem_efficient, features):
    """The output differs from one process's by the order of a float sum; x's gradient not at all."""
    config = {"weight_scaling": scaling, "mem_efficient": mem_efficient}
    alone, layer = (converted(nn.Linear(features, 16), **config) for _ in range(2))
    layer.load_state_dict(alone.state_dict())
    row_parallel(layer, input_layouts=Replicate())
    x, same_x = batch(features=features).requires_grad_(), batch(features=features).requires_grad_()
    assert_close(layer(x), alone(same_x))
    grad = batch(features=16, step=1)
    layer(x).backward(grad)
    alone(same_x).backward(grad)
    assert torch.equal(x.grad, same_x.grad)
    check_gradients(layer, alone)


@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_a_block(scaling):
    """Column, then row, trained; with the sequence cut up between them and without."""
    for cuts_sequence in (False, True):
        alone, model = converted(mlp(32, 16), weight_scaling=scaling), converted(mlp(32, 16), weight_scaling=scaling)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        if cuts_sequence:
            plan["2"] = RowwiseParallel(output_layouts=Shard(1))
            plan["0"] = ColwiseParallel(input_layouts=Shard(1))
            plan[""] = PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
            )
        parallelize_module(model, tensor_parallel(), plan)
        optimizers = [sgd(alone), sgd(model)]
        for step in range(2):
            x = batch(rows=24, step=step).view(4, 6, 20)
            y, expected = model(x), alone(x)
            if cuts_sequence:
                expected = expected.chunk(2, dim=1)[dist.get_rank()]
            assert_close(y, expected)
            model.zero_grad()
            alone.zero_grad()
            y.square().sum().backward()
            alone(x).square().sum().backward()
            check_gradients(model, alone)
            for optimizer in optimizers:
                optimizer.step()
            model.load_state_dict(
                {
                    name: distribute_tensor(value, parameter.device_mesh, parameter.placements)
                    for (name, value), parameter in zip(alone.state_dict().items(), model.parameters(), strict=True)
                }
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_one_bad_value_reaches_what_it_does_in_one_process(scaling, value):
    alone = converted(nn.Linear(20, 16), weight_scaling=scaling)
    with torch.no_grad():
        alone.weight[15, 19] = value  # the last rank's, however it is cut
    bad_x = batch()
    bad_x[3, 19] = value
    for parallel, layouts in (
        (column_parallel, {"output_layouts": Replicate()}),
        (row_parallel, {"input_layouts": Replicate()}),
    ):
        layer = converted(nn.Linear(20, 16), weight_scaling=scaling)
        layer.load_state_dict(alone.state_dict())
        parallel(layer, **layouts)
        assert torch.equal(layer(batch()).isfinite(), alone(batch()).isfinite())
    layer = converted(nn.Linear(20, 16), weight_scaling=scaling)
    row_parallel(layer, input_layouts=Replicate())
    assert torch.equal(layer(bad_x).isfinite().all(1), torch.arange(8) != 3)


@pytest.mark.parametrize("all_gather", ["high_precision", "int8"])
@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(4)
def test_with_fully_shard_on_a_2d_mesh(scaling, all_gather):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    alone, model = converted(mlp(34, 16), weight_scaling=scaling), mlp(34, 16)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    convert_all(model, ts.SwitchBackConfig(scaling, all_gather=all_gather))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh["data"])
    optimizer = sgd(model)
    for step in range(3):
        with torch.no_grad():
            for parameter, value in zip(alone.parameters(), model.parameters(), strict=True):
                parameter.copy_(value.full_tensor())
        x = batch(step=step)
        own = x.chunk(2)[mesh["data"].get_local_rank()]
        y = model(own)
        assert_close(y, alone(x).chunk(2)[mesh["data"].get_local_rank()])
        alone.zero_grad()
        loss_of(alone(x)).backward()
        loss_of(y).backward()
        if all_gather == "int8":
            check_qdata(model[0], scaling)
            check_qdata(model[2], scaling)
        if (scaling, all_gather) != ("rowwise", "int8"):  # whose Wᵀ is quantized from the int8 values of W
            check_gradients(model, alone)
        optimizer.step()
        optimizer.zero_grad()
        if all_gather == "int8" and step:
            precompute_absmax_for_fsdp(model)


def check_qdata(layer, scaling):
    quantize = ts.ops.quantize_global if scaling == "global" else ts.ops.quantize_rowwise
    qdata, absmax = quantize(layer.weight.full_tensor().detach())
    layer.unshard()
    mesh, placements = layer.weight.device_mesh, layer.weight.placements
    local = layer.weight.to_local()
    assert torch.equal(local._qdata[: local.shape[0]], distribute_tensor(qdata, mesh, placements).to_local())
    if scaling == "rowwise" and placements == (Shard(0),):
        absmax = distribute_tensor(absmax, mesh, placements).to_local()
    assert torch.equal(local._absmax, absmax)
    layer.reshard()


@in_processes(2)
def test_what_is_refused():
    layer = column_parallel(converted(nn.Linear(20, 16)))
    with pytest.raises(TypeError, match="x is a Tensor"):
        ts.switchback_linear(batch(), layer.weight)
    replicated = distribute_tensor(batch(), layer.weight.device_mesh, [Replicate()])
    with pytest.raises(TypeError, match="weight is a Tensor"):
        ts.switchback_linear(replicated, torch.randn(16, 20))
    with pytest.raises(ValueError, match="bias must be S"):
        bias = distribute_tensor(torch.randn(16), layer.weight.device_mesh, [Replicate()])
        ts.switchback_linear(replicated, layer.weight, bias)
    with pytest.raises(ValueError, match="weight must be placed"):
        partial = DTensor.from_local(torch.randn(16, 20), layer.weight.device_mesh, [Partial()])
        ts.switchback_linear(replicated, partial)
    with pytest.raises(ValueError, match="one mesh of one dimension"):
        flat = init_device_mesh("cpu", (1, 2))
        ts.switchback_linear(distribute_tensor(batch(), flat, [Replicate()] * 2), layer.weight)
    with pytest.raises(RuntimeError, match="prepare_for_eval: weight is sharded"):
        layer.prepare_for_eval()
    prepared = converted(nn.Linear(20, 16))
    prepared.prepare_for_eval()
    with pytest.raises(TypeError, match="prepared for evaluation"):
        column_parallel(prepared)(batch())
    with pytest.raises(ValueError, match="grad_weight='int8' is not available"):
        column_parallel(converted(nn.Linear(20, 16), grad_weight="int8"))(batch())
    with pytest.raises(ValueError, match="rotate_features=16 is not available"):
        column_parallel(converted(nn.Linear(20, 16), weight_scaling="rowwise", rotate_features=16))(batch())


@in_processes(2)
def test_converted_before_parallelize_module():
    """Then the wrapped weight does not know that it has been cut up."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    layer = converted(nn.Linear(20, 16), all_gather="int8")
    with pytest.raises(RuntimeError, match="after parallelize_module"):
        parallelize_module(layer, mesh["tensor"], ColwiseParallel())
        fully_shard(layer, mesh=mesh["data"])
        layer(batch())


@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_compiled_it_is_one_graph(scaling):
    torch.compiler.reset()
    model = converted(mlp(32, 16), weight_scaling=scaling)
    parallelize_module(model, tensor_parallel(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    graphs = CompileCounterWithBackend("aot_eager")
    y = torch.compile(model, backend=graphs, fullgraph=True)(batch())
    assert torch.equal(y, model(batch()))
    loss_of(y).backward()
    assert graphs.frame_count == 1
    assert all(parameter.grad.full_tensor().any() for parameter in model.parameters())


@in_processes(2)
def test_explain_knows_that_they_ignore_min_tokens():
    model = converted(mlp(32, 16), min_tokens=10**6)
    parallelize_module(model, tensor_parallel(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for how in ({"sample_input": batch()}, {"tokens": 8}):
        assert {layer.reason for layer in ts.explain(model, **how).layers} == {""}


@in_processes(2)
def test_the_monitor_refuses_them_by_name():
    """And takes what fully_shard alone has cut up: tests/distributed/test_fsdp.py."""
    model = convert_all(mlp(32, 16))
    parallelize_module(model, tensor_parallel(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with Monitor(model), pytest.raises(NotImplementedError, match="Monitor: layer '0' is tensor-parallel"):
        model(batch())
    model(batch()).sum().backward()
