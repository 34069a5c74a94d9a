"""Every optimizer keeps the masks and lowers the loss, in native layers and in layers held to their masks."""

import importlib.util

import pytest
import torch
from timm.optim import param_groups_weight_decay
from tiny import bert, losses, make_trainer, pruned, resnet, timm_resnet
from torch import nn
from transformers.training_args import OptimizerNames

from sparse_ft.conversion import convert
from sparse_ft.masks import mask_state

# What each optimizer of Trainer needs beside torch and transformers.
PACKAGES = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch_optimi",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "schedule_free": "schedulefree",
}
RATES = {"sgd": 0.1, "adagrad": 0.05, "adafactor": 0.01, "rmsprop": 3e-3}


def package(name: str) -> str | None:
    if name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        return None
    for prefix, needed in PACKAGES.items():
        if name.startswith(prefix):
            return needed
    return "bitsandbytes"


def check(trainer, masks):
    """Trains; afterwards no weight outside the masks has moved, and neither has its optimizer state."""
    trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < sum(history[:4])
    weights = trainer.model.state_dict()
    for name, mask in masks.items():
        assert not weights[name][~mask].any(), name
        assert weights[name][mask].any(), name
    for name, mask in trainer._frozen.masks.items():
        parameter = trainer.model.get_parameter(name)
        for key, state in trainer.optimizer.state[parameter].items():
            if torch.is_tensor(state) and state.shape == parameter.shape:
                assert state[~mask].abs().max() < 1e-6, (name, key)  # Adamax keeps its epsilon there


def installed() -> list[str]:
    names = [name.value for name in OptimizerNames]
    return [name for name in names if package(name) is None or importlib.util.find_spec(str(package(name)))]


@pytest.mark.parametrize("policy", ["always", "none"])
@pytest.mark.parametrize("name", installed())
def test_optimizers_of_trainer(tmp_path, name, policy):
    model = pruned(bert(dropout=0.0))
    masks = mask_state(model)
    rate = RATES.get(name, 1e-2)
    trainer = make_trainer(
        model, tmp_path, optim=name, sparse_policy=policy, learning_rate=rate, weight_decay=0.01, num_train_epochs=3
    )
    check(trainer, masks)


@pytest.mark.parametrize("policy", ["always", "none"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.01}),
        (torch.optim.RAdam, {"lr": 1e-2}),
        (torch.optim.Adamax, {"lr": 1e-2}),
        (torch.optim.Adadelta, {"lr": 1.0}),
        (torch.optim.ASGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ],
)
def test_optimizer_classes(tmp_path, cls, options, policy):
    model = pruned(resnet())
    masks = mask_state(model)
    trainer = make_trainer(
        model,
        tmp_path,
        sparse_policy=policy,
        num_train_epochs=3,
        trainer_options={"optimizer_cls_and_kwargs": (cls, options)},
    )
    check(trainer, masks)


def test_optimizer_made_after_the_conversion(tmp_path):
    model = pruned(resnet())
    masks = mask_state(model)
    convert(model, policy="always")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    check(make_trainer(model, tmp_path, num_train_epochs=3, trainer_options={"optimizers": (optimizer, None)}), masks)


def test_optimizer_made_before_the_conversion_is_refused(tmp_path):
    model = pruned(resnet())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = make_trainer(model, tmp_path, trainer_options={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="optimizer was made for the dense weights.*call sparse_ft.convert"):
        trainer.train()


def test_optimizer_of_whole_matrices_is_refused(tmp_path):
    trainer = make_trainer(pruned(bert()), tmp_path, optim="galore_adamw", optim_target_modules="all-linear")
    with pytest.raises(ValueError, match="optim=galore_adamw projects whole weight matrices"):
        trainer.train()


def names_by_decay(model: nn.Module, groups) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("make_model", [resnet, bert, timm_resnet])
def test_sparse_weights_decay_as_their_dense_form(tmp_path, make_model):
    dense, sparse = pruned(make_model()), pruned(make_model())
    convert(sparse, policy="always")
    groups = [param_groups_weight_decay(model, weight_decay=0.1) for model in (dense, sparse)]
    assert names_by_decay(dense, groups[0]) == names_by_decay(sparse, groups[1])
    trainers = [make_trainer(model, tmp_path, weight_decay=0.1) for model in (dense, sparse)]
    groups = [trainer.create_optimizer().param_groups for trainer in trainers]
    assert names_by_decay(dense, groups[0]) == names_by_decay(sparse, groups[1])
