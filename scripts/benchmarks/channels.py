"""Training steps with a part of the channels (FBPS): what is computed, and how long it takes, against dense."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_ft import SparseSession
from sparse_ft.channels import SubNetwork, analyze_channels
from sparse_ft.steps import loss_of, make_optimizer, to_channels_last, training_step
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings

KEEP = (0.7, 0.5, 0.3)
RESNET20 = {"layers": (3, 3, 3, 0), "channels": (16, 32, 64, 64)}  # of the bundled model
RECIPE = "modifiers:\n  - !FBPSModifier {{final_sparsity: {}, end_epoch: 1, candidates: 0, backward: {}}}\n"


@dataclass(frozen=True)
class Network:
    """A timm model and its batch."""

    title: str
    model: str
    batch: int
    size: int
    resnet20: bool = False

    @property
    def name(self) -> str:
        """As in a case's name."""
        return f"{'resnet20' if self.resnet20 else self.model}-b{self.batch}-{self.size}"

    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = timm.create_model(self.model, num_classes=10, **(RESNET20 if self.resnet20 else {}))
        return model, torch.randn(self.batch, 3, self.size, self.size)


NETWORKS = [
    Network("ResNet-18, batch 32, 224²", "resnet18", 32, 224),
    Network("ResNet-18, batch 64, 32²", "resnet18", 64, 32),
    Network("ResNet-20 (three stages), batch 64, 64²", "resnet18", 64, 64, resnet20=True),
]


def cases() -> list[Case]:
    return [Case(f"channels/{network.name}", lambda s, n=network: measure(n, s)) for network in NETWORKS]


def measure(network: Network, settings: Settings) -> dict:
    model, images = network.make()
    runs: dict[str, Callable[[], object]] = {}
    for layout, batch in (("contiguous", images), ("channels_last", to_channels_last(images))):
        ours = _in_layout(model, layout)
        runs[f"dense {layout}"] = training_step(ours, batch, make_optimizer(ours, "sgd"))
    for keep in KEEP:
        for backward in ("one", "both"):
            ours = _in_layout(model, "channels_last")  # which suits odd numbers of channels better
            runs[f"{backward} {keep:g}"] = sampled_step(ours, to_channels_last(images), keep, backward)
    milliseconds = {name: seconds * 1e3 for name, seconds in interleaved_medians(runs, rounds=settings.rounds).items()}
    return {
        "title": network.title,
        "workload": asdict(network),
        "ms": milliseconds,
        "operations": {f"{keep:g}": share_of_operations(model, images[:2], keep) for keep in KEEP},
    }


def _in_layout(model: nn.Module, layout: str) -> nn.Module:
    made: Any = copy.deepcopy(model)
    return made.to(memory_format=getattr(torch, "channels_last" if layout == "channels_last" else "contiguous_format"))


def sampled_step(model: nn.Module, batch: Tensor, keep: float, backward: str) -> Callable[[], None]:
    """Whole steps: two masks drawn, forward twice, backward once or twice, weights and probabilities moved."""
    optimizer = make_optimizer(model, "sgd")
    session = SparseSession(model.train(), RECIPE.format(round(1 - keep, 4), backward), optimizer, 10**6)

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
