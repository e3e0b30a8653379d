"""FSDP2's int8 all-gather through NCCL, on one GPU: its streams and its gathers as bytes. Two want the example."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import torch_switchback as ts
from testing import convert_all


@pytest.fixture(scope="module", autouse=True)
def process_group():
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precomputes", [False, True])
@pytest.mark.parametrize("scaling", ["global", "rowwise"])
def test_trains_as_without(scaling, precomputes):
    """The weights are bfloat16 already, so the int8 values are the same; and with them the output."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    original = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to("cuda", torch.bfloat16)
    outputs = {}
    for all_gather in ("high_precision", "int8"):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to("cuda", torch.bfloat16)
        model.load_state_dict(original.state_dict())
        convert_all(model, ts.SwitchBackConfig(scaling, all_gather=all_gather))
        for layer in model:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs[all_gather] = []
        for step in range(4):
            x = torch.randn(256, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            y = model(x)
            y.float().square().mean().backward()
            outputs[all_gather].append(y.detach())
            if scaling == "global":  # a rowwise Wᵀ is quantized from the int8 values of W, so the gradients differ
                optimizer.step()
            optimizer.zero_grad()
            if precomputes and all_gather == "int8":
                ts.distributed.precompute_absmax_for_fsdp(model)
    for actual, expected in zip(*outputs.values(), strict=True):
        assert torch.equal(actual, expected)
