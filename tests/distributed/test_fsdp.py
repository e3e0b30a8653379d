"""fully_shard: unchanged on a converted model, and with weights that are gathered as int8."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dist_utils import in_processes
from models import assert_close, batch, converted, loss_of, mlp, own, sgd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torch_switchback as ts
from testing import convert_all
from torch_switchback.analysis.explanation import _try
from torch_switchback.analysis.layer_calls import Call
from torch_switchback.analysis.monitor import Monitor, measure
from torch_switchback.distributed import precompute_absmax_for_fsdp
from torch_switchback.distributed.fsdp_weights import ShardWeight

SCALINGS = ["global", "rowwise"]


def sharded(model, **options):
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def gathered(layer):
    """A layer's int8 values and absmax as FSDP2 gathers them."""
    layer.unshard()
    qdata, absmax = layer.weight._qdata.clone(), layer.weight._absmax.clone()
    layer.reshard()
    return qdata[: layer.out_features], absmax


def full_weights(model):
    return [parameter.full_tensor() for parameter in model.parameters()]


class Collectives(TorchDispatchMode):
    """Names, dtypes and bytes of the tensors that a rank receives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            target = args[0][0] if isinstance(args[0], list) else args[0]
            self.seen.append((func._schema.name.removeprefix("c10d::"), target.dtype, target.nbytes))
        return func(*args, **(kwargs or {}))

    def bytes_of(self, name):
        return sum(size for collective, _, size in self.seen if name in collective)


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_high_precision(scaling, cache, dtype, reshard):
    """Outputs are a process's with the weights in the policy's dtype; a weight cache never serves the last step's."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model = converted(mlp(), weight_scaling=scaling, cache_quantized_weight=cache)
    sharded(model, mp_policy=policy, reshard_after_forward=reshard)
    optimizer = sgd(model)
    for step in range(3):
        alone = converted(mlp(), weight_scaling=scaling)
        with torch.no_grad():
            for parameter, value in zip(alone.parameters(), full_weights(model), strict=True):
                parameter.copy_(value)
        x = batch(step=step)
        y, expected = model(own(x)), alone.to(dtype)(x if dtype is None else x.to(dtype))
        assert torch.equal(y, own(expected))
        loss_of(y).backward()
        loss_of(expected).backward()
        if dtype is None:
            for parameter, value in zip(model.parameters(), alone.parameters(), strict=True):
                assert_close(parameter.grad.full_tensor(), value.grad)
        optimizer.step()
        optimizer.zero_grad()


@in_processes(2)
def test_a_weight_cache_when_the_next_weight_lies_in_the_same_memory():
    """The version is the same too, so FSDP2 leaves no other sign of the change."""
    outputs = []
    for cache in (False, True):
        model = sharded(converted(mlp(), cache_quantized_weight=cache))
        optimizer = sgd(model)
        with mock.patch("torch.distributed.fsdp._fully_shard._fsdp_param.free_storage"):
            for step in range(2):
                y = model(own(batch(step=step)))
                loss_of(y).backward()
                optimizer.step()
        outputs.append(y)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("out", [7, 3, 8], ids=lambda out: f"{out} rows")
@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(4)
def test_int8_values_are_those_of_one_process(scaling, out):
    """Also with shards that are padded (33 and 7 rows among 4), or empty (3 rows)."""
    quantize = ts.ops.quantize_global if scaling == "global" else ts.ops.quantize_rowwise
    original = mlp(out=out)
    model = sharded(converted(original, weight_scaling=scaling, all_gather="int8"))
    optimizer = sgd(model)
    for step in range(3):
        for layer in (model[0], model[2]):
            qdata, absmax = quantize(layer.weight.full_tensor())
            for actual, expected in zip(gathered(layer), (qdata, absmax), strict=True):
                assert actual.dtype == expected.dtype and torch.equal(actual, expected)
        loss_of(model(own(batch(step=step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            precompute_absmax_for_fsdp(model)


@pytest.mark.parametrize("reshard", [False, True])
@in_processes(2)
def test_int8_trains_as_one_process(reshard):
    alone, model = converted(mlp()), converted(mlp(), all_gather="int8")
    sharded(model, reshard_after_forward=reshard)
    optimizers = [sgd(alone), sgd(model)]
    for step in range(4):
        x = batch(step=step)
        if step == 3:  # in two microbatches, whose gradients are reduced together
            model.set_requires_gradient_sync(False)
            for half in own(x).chunk(2):
                (loss_of(model(half)) / 2).backward()
                model.set_requires_gradient_sync(True)
        else:
            loss_of(model(own(x))).backward()
        loss_of(alone(x)).backward()
        for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
            assert_close(actual.grad.full_tensor(), expected.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # The same weights to the bit again, or the products' last int8 values may differ from here on.
        with torch.no_grad():
            for parameter, value in zip(alone.parameters(), full_weights(model), strict=True):
                parameter.copy_(value)


@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_int8_with_a_policy_quantizes_the_weights_themselves(scaling):
    """Not what they are in the policy's dtype: the int8 values are more exact than those of bf16's all-gather."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(converted(mlp(), weight_scaling=scaling, all_gather="int8"), mp_policy=policy)
    x = batch()
    y = model(own(x))
    alone = converted(mlp(), weight_scaling=scaling)
    with torch.autocast("cpu", torch.bfloat16):
        assert y.dtype == torch.bfloat16
        hidden = F.gelu(ts.switchback_linear(x, alone[0].weight, alone[0].bias.bfloat16(), alone[0].config))
        expected = ts.switchback_linear(hidden, alone[2].weight, alone[2].bias.bfloat16(), alone[2].config)
    assert torch.equal(y, own(expected))
    loss_of(y).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.full_tensor().any()


@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_shards_along_the_input_features(scaling):
    original = nn.Linear(20, 6)
    layer = converted(original, weight_scaling=scaling, all_gather="int8")
    fully_shard(layer, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    quantize = ts.ops.quantize_global if scaling == "global" else ts.ops.quantize_rowwise
    expected = quantize(original.weight)
    assert layer.weight.to_local().shape == (6, 10)
    qdata, absmax = gathered(layer)
    assert torch.equal(qdata, expected[0]) and torch.equal(absmax, expected[1])


@in_processes(4)
def test_hybrid_sharding():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone, model = converted(mlp()), sharded(converted(mlp(), all_gather="int8"), mesh=mesh)
    for _ in range(2):
        precompute_absmax_for_fsdp(model)
        x = batch()
        loss_of(model(own(x))).backward()
        loss_of(alone(x)).backward()
    for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(actual.grad.full_tensor(), expected.grad)


@in_processes(2)
def test_bytes():
    """int8 moves half of bf16's bytes for a weight, and biases as they were."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    received = {}
    for all_gather in ("high_precision", "int8"):
        model = sharded(converted(mlp(hidden=32, out=8), all_gather=all_gather), mp_policy=policy)
        with Collectives() as collectives:
            model(own(batch()))
        received[all_gather] = collectives.bytes_of("allgather")
    weights, biases = 20 * 32 + 32 * 8, 32 + 8
    assert received == {"high_precision": 2 * weights + 2 * biases, "int8": weights + 2 * biases}


@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_absmaxes_in_one_all_reduce(scaling):
    model = sharded(converted(mlp(), weight_scaling=scaling, all_gather="int8"))
    optimizer = sgd(model)

    def all_reduces(call):
        with Collectives() as collectives:
            call()
        return [size for name, _, size in collectives.seen if name == "allreduce_"]

    absmaxes = 4 * (2 if scaling == "global" else 33 + 7)
    x = own(batch())
    assert len(all_reduces(lambda: loss_of(model(x)).backward())) == 2, "one a weight if they were not precomputed"
    assert all_reduces(lambda: loss_of(model(x)).backward()) == [], "the weights have not changed"
    optimizer.step()
    assert all_reduces(lambda: precompute_absmax_for_fsdp(model)) == [absmaxes]
    assert all_reduces(lambda: loss_of(model(x)).backward()) == []
    optimizer.step()
    assert len(all_reduces(lambda: model(x))) == 2, "the precomputed absmaxes are of other weights"


def by_optimizer(model):
    loss_of(model(own(batch()))).backward()
    sgd(model).step()


def by_fused_optimizer(model):
    loss_of(model(own(batch()))).backward()
    torch.optim.AdamW(model.parameters(), lr=0.5, fused=True).step()


def by_loading(model):
    model.load_state_dict({name: value * 3 for name, value in model.state_dict().items()})


def by_writing_into_the_state_dict(model):
    for value in model.state_dict().values():
        value.mul_(3)


def by_local_tensors(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(3)


def by_init(model):
    torch.manual_seed(dist.get_rank())
    for parameter in model.parameters():
        nn.init.normal_(parameter)


CHANGES = [
    by_optimizer,
    by_fused_optimizer,
    by_loading,
    by_writing_into_the_state_dict,
    by_local_tensors,
    by_init,
]


@pytest.mark.parametrize("change", range(len(CHANGES)), ids=[change.__name__ for change in CHANGES])
@in_processes(4)
def test_a_change_is_seen(change):
    """On 4 ranks, of which one has no row of the second layer: all must agree that the absmax is to be found."""
    model = sharded(converted(mlp(out=3), all_gather="int8"))
    precompute_absmax_for_fsdp(model)
    before = gathered(model[2])
    CHANGES[change](model)
    qdata, absmax = ts.ops.quantize_global(model[2].weight.full_tensor())
    after = gathered(model[2])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(after[0], qdata) and torch.equal(after[1], absmax)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_one_bad_weight_on_one_rank_shows_on_all(scaling, value):
    original = mlp()
    with torch.no_grad():
        original[0].weight[30, 3] = value  # the last rank's
    layer = fully_shard(converted(original, weight_scaling=scaling, all_gather="int8")[0])
    y, expected = layer(batch()), converted(original, weight_scaling=scaling)[0](batch())
    assert torch.equal(y.isfinite(), expected.isfinite()) and not y.isfinite().all()
    assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


@in_processes(2)
def test_state_dict_is_that_of_a_plain_model():
    plain = sharded(mlp())
    model = sharded(converted(mlp(), all_gather="int8"))
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert type(value) is DTensor and type(value.to_local()) is torch.Tensor
        assert value.placements == expected[name].placements
        assert torch.equal(value.full_tensor(), expected[name].full_tensor())
    plain.load_state_dict(state)
    model.load_state_dict(expected)
    model.load_state_dict(expected, assign=True)
    assert isinstance(model[0].weight.to_local(), ShardWeight)
    assert torch.equal(gathered(model[0])[0], ts.ops.quantize_global(mlp()[0].weight)[0])


@in_processes(2)
def test_built_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 7))
    sharded(convert_all(model, ts.SwitchBackConfig(all_gather="int8")))
    model.to_empty(device="cpu")
    expected = mlp().state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.distributed.tensor.distribute_tensor(expected[name], parameter.device_mesh, [Shard(0)])
            )
    assert torch.equal(model(batch()), converted(mlp())(batch()))


@in_processes(2)
def test_offloaded_to_the_cpu():
    model = sharded(converted(mlp(), all_gather="int8"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    for _ in range(2):
        assert torch.equal(model(batch()), converted(mlp())(batch()))
        precompute_absmax_for_fsdp(model)


@in_processes(2)
def test_an_evaluation_between_two_steps():
    model = sharded(converted(mlp(), all_gather="int8"))
    with torch.no_grad():
        expected = model(batch())
    loss_of(model(batch())).backward()
    assert torch.equal(model(batch()), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("all_gather", ["high_precision", "int8"])
@in_processes(2)
def test_activation_checkpointing(all_gather, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = sharded(converted(mlp(), all_gather=all_gather))
        x = own(batch()).requires_grad_()
        if checkpointed:
            y = checkpoint(model, x, use_reentrant=use_reentrant)
        else:
            y = model(x)
        loss_of(y).backward()
        gradients.append([x.grad, *(parameter.grad.to_local() for parameter in model.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("all_gather", ["high_precision", "int8"])
@in_processes(2)
def test_compiled(all_gather):
    torch.compiler.reset()
    results = []
    for compiles in (False, True):
        model = converted(mlp(), all_gather=all_gather)
        sharded(model)
        if compiles:
            for layer in (model[0], model[2]):
                layer.compile(backend="aot_eager")
        optimizer = sgd(model)
        outputs = []
        for step in range(3):
            y = model(own(batch(step=step)))
            outputs.append(y)
            loss_of(y).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(outputs)
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@in_processes(2)
def test_the_monitor_compares_with_the_gathered_int8_values(scaling):
    """The result is that of measure() for a layer whose weight is the dequantized int8 values."""
    alone = converted(mlp(), weight_scaling=scaling)
    model = sharded(converted(mlp(), weight_scaling=scaling, all_gather="int8", min_tokens=10**6))
    qdata, absmax = gathered(model[2])
    with torch.no_grad():
        alone[2].weight.copy_(qdata * (absmax / 127).reshape(-1, 1))
    inputs = []
    model[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with Monitor(model) as monitor:
        y = model(own(batch()))
        y.sum().backward()
        monitor.step()
    expected = measure(alone[2], inputs[0], torch.ones_like(y))
    assert set(monitor.latest) == {"0", "2"}
    assert monitor.latest["2"].pop("in_int8") == 1, "int8 values are all that a rank has"
    for quantity, value in monitor.latest["2"].items():
        assert value == pytest.approx(expected[quantity], rel=1e-3), quantity
    assert all(parameter.grad is not None for parameter in model.parameters())


@in_processes(2)
def test_what_is_refused():
    config = ts.SwitchBackConfig(all_gather="int8")
    model = fully_shard(mlp())
    with pytest.raises(RuntimeError, match="before fully_shard"):
        convert_all(model, config)
    assert not any(isinstance(module, ts.SwitchBackLinear) for module in model.modules())
    model = sharded(converted(mlp(), all_gather="int8"))
    with pytest.raises(RuntimeError, match="cannot be undone"):
        ts.revert_switchback(model)
    with pytest.raises(RuntimeError, match="prepare_for_eval: weight is sharded"):
        model[0].prepare_for_eval()
    model[0].unshard()
    with pytest.raises(NotImplementedError, match="gathered as int8"):
        F.linear(batch(), model[0].weight)
    with pytest.raises(NotImplementedError, match="gathered as int8"), torch.no_grad():
        model[0].weight.zero_()
    model[0].reshard()
    model[0].config = ts.SwitchBackConfig("rowwise", all_gather="int8")
    with pytest.raises(ValueError, match="gathered with 1 absmaxes"):
        model(batch())
    with pytest.raises(ValueError, match="no layer was converted"):
        precompute_absmax_for_fsdp(sharded(mlp()))


def test_a_refused_model_is_as_it_was():
    tied = nn.ModuleDict(
        {"embedding": nn.Embedding(8, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)}
    )
    tied["head"].weight = tied["embedding"].weight
    before = dict(tied.named_parameters())
    with pytest.raises(ValueError, match=r"head\.weight is also embedding\.weight"):
        convert_all(tied, ts.SwitchBackConfig(all_gather="int8"))
    assert [type(module) for module in tied.values()] == [nn.Embedding, nn.Linear, nn.Linear]
    assert all(parameter is before[name] for name, parameter in tied.named_parameters())


@in_processes(2)
def test_a_model_that_cannot_be_reverted_is_as_it_was():
    model = converted(mlp(), all_gather="int8")
    fully_shard(model[2])
    with pytest.raises(RuntimeError, match="cannot be undone"):
        ts.revert_switchback(model)
    assert isinstance(model[0].weight, ShardWeight) and isinstance(model[0], ts.SwitchBackLinear)


def test_without_fully_shard_it_is_a_plain_layer():
    """On one device all_gather makes no difference, to copies and to what is undone neither."""
    plain, model = converted(mlp()), converted(mlp(), all_gather="int8")
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (plain, model)]
    for step in range(3):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            loss_of(each(batch(step=step))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model(batch()), plain(batch()))
    assert torch.equal(copy.deepcopy(model)(batch()), plain(batch()))
    with torch.no_grad():
        assert model[0].weight.mul_(2) is model[0].weight
        assert torch.add(model[2].weight, 1, out=model[2].weight) is model[2].weight
        plain[0].weight.mul_(2)
        plain[2].weight.add_(1)
    assert torch.equal(model(batch()), plain(batch()))
    state = model.state_dict()
    assert {name: type(value) for name, value in state.items()} == dict.fromkeys(plain.state_dict(), torch.Tensor)
    ts.revert_switchback(model)
    assert [type(parameter) for parameter in model.parameters()] == [nn.Parameter] * 4
    assert torch.equal(model[0].weight, plain[0].weight)


def test_a_prepared_model_is_reverted_to_plain_parameters():
    model = ts.prepare_for_eval(converted(mlp(), all_gather="int8"))
    ts.revert_switchback(model)
    assert [type(parameter) for parameter in model.parameters()] == [nn.Parameter] * 4


@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_without_fully_shard(scaling):
    torch.compiler.reset()
    alone, model = (converted(mlp(), weight_scaling=scaling, all_gather="int8") for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers = [sgd(alone), sgd(model)]
    for step in range(2):
        for each, optimizer in zip((alone, compiled), optimizers, strict=True):
            loss_of(each(batch(step=step))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(compiled(batch()), alone(batch()))
    for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(actual, expected)


def test_one_graph_serves_two_weights_but_not_their_absmax():
    torch.compiler.reset()
    model = converted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), all_gather="int8")
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda layer, x: (layer(x), layer.weight.detach()), backend=graphs)
    for layer in model:
        x = torch.randn(4, 8)
        y, weight = compiled(layer, x)
        assert torch.equal(y, layer(x)) and torch.equal(weight, layer.weight)
        weight._absmax.set(torch.ones(1), weight._data)
        assert all(each.weight._absmax.get(each.weight._data) is None for each in model)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("scaling", SCALINGS)
def test_parameters_stay_the_same_objects(scaling):
    """There and back, with what belongs to them, so that an optimizer made before trains them."""
    model, called = mlp(), []
    before = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model[0].weight
    handle = weight.register_hook(lambda grad: called.append("before"))
    weight.register_post_accumulate_grad_hook(lambda parameter: called.append("after"))
    weight.lr_scale = 0.5

    def train():
        called.clear()
        value = weight.detach().clone()
        loss_of(model(batch())).backward()
        optimizer.step()
        assert not torch.equal(weight, value)
        return list(called)

    def check_and_train(expected):
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert weight.lr_scale == 0.5 and torch.equal(weight.grad, grad)
        assert train() == expected

    train()
    grad = weight.grad.clone()
    convert_all(model, ts.SwitchBackConfig(scaling, all_gather="int8"))
    assert isinstance(weight, ShardWeight)
    check_and_train(["before", "after"])
    grad = weight.grad.clone()
    ts.revert_switchback(model)
    assert type(weight) is nn.Parameter and vars(weight) == {"lr_scale": 0.5}
    check_and_train(["before", "after"])
    handle.remove()
    assert train() == ["after"]


def test_a_weight_that_is_held_otherwise_is_refused():
    model = mlp()
    held = model[2].weight.view(-1)
    with pytest.raises(RuntimeError, match=r"2\.weight is held by a view"):
        convert_all(model, ts.SwitchBackConfig(all_gather="int8"))
    assert [type(parameter) for parameter in model.parameters()] == [nn.Parameter] * 4
    assert not any(isinstance(module, ts.SwitchBackLinear) for module in model)
    del held
    assert isinstance(convert_all(model, ts.SwitchBackConfig(all_gather="int8"))[0].weight, ShardWeight)


@pytest.mark.parametrize(("all_gather", "reason"), [("int8", ""), ("high_precision", "computes as nn.Linear")])
@in_processes(2)
def test_explain_knows_that_gathered_int8_values_ignore_min_tokens(all_gather, reason):
    model = sharded(converted(mlp(), all_gather=all_gather, min_tokens=10**6))
    for layer in ts.explain(model, own(batch())).layers:
        assert layer.reason.startswith(reason) and bool(layer.matmuls) == (not reason)


@in_processes(2)
def test_explain_tries_layers_whose_weights_are_cut_up():
    """It gives the layer a weight of its own, as on a GPU."""
    model = sharded(converted(mlp()))
    _try(model[0], Call(8, "float32", in_int8=True), torch.device("cpu"))
