"""DistributedDataParallel: the gradients are those of one process with the whole batch."""

import copy

import pytest
import torch
from dist_utils import in_processes
from models import assert_close, batch, converted, loss_of, mlp, own, sgd
from torch.nn.parallel import DistributedDataParallel

from torch_switchback import prepare_for_eval, prepare_for_training, revert_switchback

STRATEGIES = [
    {"weight_scaling": scaling, "mem_efficient": mem_efficient}
    for scaling in ("global", "rowwise")
    for mem_efficient in (False, True)
]


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("config", STRATEGIES, ids=str)
@in_processes(2)
def test_gradients(config, static_graph):
    alone = converted(mlp(), **config)
    parallel = DistributedDataParallel(converted(mlp(), **config), static_graph=static_graph)
    for step in range(3):
        x = batch(step=step)
        for model, rows in ((alone, x), (parallel, own(x))):
            model.zero_grad()
            loss_of(model(rows)).backward()
        for actual, expected in zip(parallel.parameters(), alone.parameters(), strict=True):
            assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("scaling", ["global", "rowwise"])
@in_processes(2)
def test_accumulation_with_no_sync_and_a_weight_cache(scaling):
    """The cache serves the microbatches of a step and is renewed by the optimizer."""
    models = [
        DistributedDataParallel(converted(mlp(), weight_scaling=scaling, cache_quantized_weight=cache))
        for cache in (True, False)
    ]
    optimizers = [sgd(model) for model in models]
    for step in range(3):
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            first, second = own(batch(step=step)).chunk(2)
            with model.no_sync():
                loss_of(model(first)).backward()
            y = model(second)
            loss_of(y).backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(y)
        assert torch.equal(*outputs)
    assert "_weight_cache" in vars(models[0].module[0])


@pytest.mark.parametrize("scaling", ["global", "rowwise"])
@in_processes(2)
def test_a_weight_cache_with_an_optimizer_that_shards_its_state(scaling):
    """Each rank steps some of the parameters and broadcasts them into the others' ``.data``."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns, in pytest's process too

    models = [
        DistributedDataParallel(converted(mlp(), weight_scaling=scaling, cache_quantized_weight=cache))
        for cache in (True, False)
    ]
    optimizers = [ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.5) for model in models]
    for step in range(3):
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            y = model(own(batch(step=step)))
            loss_of(y).backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(y)
        assert torch.equal(*outputs)


@in_processes(2)
def test_a_frozen_base_is_prepared_before_the_model_is_wrapped():
    model = converted(mlp())
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"module\.0: call it before DistributedDataParallel wraps the model"):
        prepare_for_eval(DistributedDataParallel(model))
    model[0].prepare_for_eval()
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    x = batch()
    alone = copy.deepcopy(model)
    for each, rows in ((alone, x), (parallel, own(x))):
        loss_of(each(rows)).backward()
    for actual, expected in zip(parallel.parameters(), alone.parameters(), strict=True):
        assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("restore", [prepare_for_training, revert_switchback])
@in_processes(2)
def test_a_weight_does_not_come_back_to_train_under_a_wrapper_that_does_not_know_it(restore):
    model = prepare_for_eval(converted(mlp()))
    parallel = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"module\.0: call it before DistributedDataParallel wraps the model"):
        restore(parallel)
    assert model[0].is_prepared
    frozen = prepare_for_eval(converted(mlp()).requires_grad_(False))
    frozen[2].bias.requires_grad_()
    assert not restore(DistributedDataParallel(frozen)).module[0].weight.requires_grad
