"""Lightning's Trainer and Fabric, on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning")

from lightning.fabric import Fabric  # noqa: E402
from tasks import (  # noqa: E402
    Regressor,
    all_but_the_head,
    assert_falls,
    assert_reloads_and_reverts,
    converted,
    regression_batches,
)

from torch_switchback import SwitchBackConfig  # noqa: E402
from torch_switchback.integrations.lightning import FabricSwitchBackPrecision, SwitchBackPrecision  # noqa: E402

LAYERS = ["body.0", "body.2"]
CONVERSION = {"config": SwitchBackConfig("rowwise"), "module_filter_fn": all_but_the_head}


class LightningRegressor(lightning.LightningModule, Regressor):
    def __init__(self):
        super().__init__()
        self.losses, self.dtypes = [], set()

    def training_step(self, batch, _):
        x, y = batch
        output = self(x)
        self.dtypes.add(output.dtype)
        loss = F.mse_loss(output.float(), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def test_trainer(tmp_path):
    model = LightningRegressor()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        plugins=SwitchBackPrecision("bf16-mixed", "cpu", **CONVERSION),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(list(regression_batches(40)), batch_size=None))
    assert converted(model) == LAYERS
    assert all(model.get_submodule(name).config == CONVERSION["config"] for name in LAYERS)
    assert model.dtypes == {torch.bfloat16}
    assert_falls(model.losses, to=0.6)

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    plain = LightningRegressor.load_from_checkpoint(tmp_path / "model.ckpt")
    x = torch.randn(16, 32)
    assert_reloads_and_reverts(model, plain, lambda model: model(x))


@pytest.mark.parametrize("precision", [SwitchBackPrecision, FabricSwitchBackPrecision])
def test_an_unknown_keyword_is_named(precision):
    with pytest.raises(TypeError, match="recipe"):
        precision("bf16-mixed", "cpu", recipe="rowwise").convert_module(Regressor())


def test_fabric(tmp_path):
    fabric = Fabric(accelerator="cpu", plugins=FabricSwitchBackPrecision("bf16-mixed", "cpu", **CONVERSION))
    model = Regressor()
    module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    assert converted(model) == LAYERS
    dtypes = []
    model.head.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    losses = []
    for x, y in regression_batches(40):
        loss = F.mse_loss(module(x).float(), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert set(dtypes) == {torch.bfloat16}
    assert_falls(losses, to=0.6)

    fabric.save(tmp_path / "model.ckpt", {"model": module})
    plain = Regressor()
    plain.load_state_dict(torch.load(tmp_path / "model.ckpt")["model"], strict=True)
    x = torch.randn(16, 32)
    assert_reloads_and_reverts(model, plain, lambda model: model(x))
