"""Training steps with a part of the channels (FBPS): what is computed, and how long it takes, against dense."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from real_data import CifarResNet
from timm.layers import ClassifierHead
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_ft import SparseSession
from sparse_ft.bench import TURN_S
from sparse_ft.channels import SubNetwork, analyze_channels
from sparse_ft.steps import loss_of, make_optimizer, to_channels_last, training_step
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings

KEEP = (0.7, 0.5, 0.3)
RECIPE = "modifiers:\n  - !FBPSModifier {{final_sparsity: {}, end_epoch: 1, candidates: 0, backward: {}, seed: {}}}\n"


@dataclass(frozen=True)
class Network:
    """A network for ten classes and its batch."""

    title: str
    model: str
    batch: int
    size: int

    @property
    def name(self) -> str:
        """As in a case's name."""
        return f"{self.model}-b{self.batch}-{self.size}"

    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return MODELS[self.model](), torch.randn(self.batch, 3, self.size, self.size)


def vgg16() -> nn.Module:
    """VGG-16 for small images: the convolutions of timm's, one linear layer."""
    model: Any = timm.create_model("vgg16_bn", num_classes=10, mlp_ratio=0.01)
    model.pre_logits = nn.Identity()
    model.head = ClassifierHead(512, 10)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vgg16": vgg16,
    "resnet20": lambda: CifarResNet(20, 10),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
}
NETWORKS = [
    Network("VGG-16, batch 32, 32²", "vgg16", 32, 32),
    Network("ResNet-20, batch 64, 32²", "resnet20", 64, 32),
    Network("ResNet-18, batch 64, 32²", "resnet18", 64, 32),
    Network("ResNet-18, batch 16, 224²", "resnet18", 16, 224),
]


def cases() -> list[Case]:
    return [Case(f"channels/{network.name}", lambda s, n=network: measure(n, s)) for network in NETWORKS]


def measure(network: Network, settings: Settings) -> dict:
    model, images = network.make()
    runs: dict[str, Callable[[], object]] = {}
    # Weights stay contiguous: channels_last ones are copied by torch's fused optimizers.
    for layout, batch in (("contiguous", images), ("channels_last", to_channels_last(images))):
        ours = copy.deepcopy(model)
        runs[f"dense {layout}"] = training_step(ours, batch, make_optimizer(ours, "sgd"))
    for keep in KEEP:
        for backward in ("one", "both"):
            # Masks of their own: shapes that another run has just had would find their generated code.
            runs[f"{backward} {keep:g}"] = sampled_step(copy.deepcopy(model), images, keep, backward, seed=len(runs))
    milliseconds = {
        name: seconds * 1e3
        for name, seconds in interleaved_medians(runs, rounds=settings.rounds, turn_s=TURN_S).items()
    }
    return {
        "title": network.title,
        "workload": asdict(network),
        "ms": milliseconds,
        "operations": {f"{keep:g}": share_of_operations(model, images[:2], keep) for keep in KEEP},
    }


def sampled_step(model: nn.Module, batch: Tensor, keep: float, backward: str, seed: int) -> Callable[[], None]:
    """Whole steps: two masks drawn, forward twice, backward once or twice, weights and probabilities moved."""
    optimizer = make_optimizer(model, "sgd")
    recipe = RECIPE.format(round(1 - keep, 4), backward, seed)
    session = SparseSession(model.train(), recipe, optimizer, 10**6)

    def step() -> None:
        def again() -> Tensor:
            return loss_of(model(batch))

        session.loss(again(), None, batch, again=again).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        model.zero_grad(set_to_none=True)

    return step


def share_of_operations(model: nn.Module, images: Tensor, keep: float, masks: int = 20) -> float:
    """Operations of drawn sub-networks over those of the model, forward; their mean."""
    model = copy.deepcopy(model).eval()
    channels = analyze_channels(model, images)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(masks):
        drawn = torch.rand(channels.count, generator=generator) < keep
        kept = channels.with_floor(drawn, 1, torch.zeros(channels.count))
        with SubNetwork(model, channels, kept).active():
            total += _operations(model, images)
    return total / masks / _operations(model, images)


def _operations(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()
