"""SWAT in SparseTrainer: dense checkpoints on the way, a pruned network at the end, exact resume."""

import torch
from test_resume import SGD, assert_same_run
from tiny import make_trainer, resnet
from torch import nn

from sparse_ft.methods.swat.layers import swat_layers

RECIPE = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 3}
  - !SWATModifier
    {params: __ALL_PRUNABLE__, sparsity: 0.8, start_epoch: 0, end_epoch: 3, update_period: 2, policy: always}
"""


def test_a_run_is_resumed_exactly_and_ends_pruned(tmp_path):
    arguments = SGD | {"save_strategy": "steps", "save_steps": 3, "recipe": RECIPE, "num_train_epochs": 3}
    whole = make_trainer(resnet(), tmp_path, **arguments)
    whole.train()
    assert not swat_layers(whole.model) and whole.masks
    weights = whole.model.state_dict()  # dense, also of layers that run natively by now
    for name, mask in whole.masks.items():
        weight = weights[name]
        assert not weight[~mask].any() and int(mask.sum()) == weight.numel() - round(0.8 * weight.numel())
    for step in (3, 6):
        resumed = make_trainer(resnet(seed=1), tmp_path / "again", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)
    stem = next(module for module in whole.model.modules() if isinstance(module, nn.Conv2d))
    assert torch.count_nonzero(stem.weight) == stem.weight.numel()
