"""Which channels belong together."""

import pytest
import torch
import torch.nn.functional as F
from networks import Grouped, Residual, make
from torch import nn

from sparse_ft.channels import FIXED, ChannelError, analyze_channels


def rows(channels, layer):
    return next(place.rows for place in channels.weights() if place.layer == layer)


def columns(channels, layer):
    return next(place.columns for place in channels.weights() if place.layer == layer)


def find(name):
    model, images = make(name)
    return analyze_channels(model, images)


def test_a_channel_is_made_and_read_and_repeated_by_flattening():
    channels = find("plain")
    assert channels.count == 6 + 8 + 12
    assert torch.equal(columns(channels, "two"), rows(channels, "one"))
    assert torch.equal(columns(channels, "hidden"), rows(channels, "two").repeat_interleave(4))
    assert rows(channels, "head").eq(FIXED).all(), "what the model puts out stays whole"
    assert columns(channels, "one").eq(FIXED).all(), "and so does what it reads"


def test_what_is_added_is_one_unit():
    channels = find("residual")
    assert torch.equal(rows(channels, "stem.0"), rows(channels, "b.0"))
    assert not set(rows(channels, "a.0").tolist()) & set(rows(channels, "b.0").tolist())


def test_channels_added_to_padding_are_fixed():
    channels = find("residual")
    last = rows(channels, "d.0")
    assert last[:3].eq(FIXED).all() and last[9:].eq(FIXED).all()
    assert torch.equal(last[3:9], rows(channels, "stem.0"))


def test_concatenated_channels_stay_apart():
    channels = find("dense")
    parts = torch.cat([rows(channels, layer) for layer in ("stem.0", "a.0", "b.0")])
    assert torch.equal(columns(channels, "last.0"), parts)
    assert len(set(parts.tolist())) == 14
    assert {place.key for place in channels.places if place.layer == "norm"} == {
        "weight", "bias", "running_mean", "running_var",
    }  # fmt: skip


def test_depthwise_and_grouped_convolutions():
    channels = find("grouped")
    assert torch.equal(rows(channels, "wide.0"), rows(channels, "depthwise.0"))
    assert torch.equal(rows(channels, "excite"), rows(channels, "wide.0")), "a gate has the channels that it scales"
    group = channels.groups["grouped.0"]
    assert torch.equal(rows(channels, "before.0"), group.repeat_interleave(3))
    assert torch.equal(rows(channels, "grouped.0"), group.repeat_interleave(4))


def test_layer_norms_fix_their_channels():
    channels = find("mixer")
    assert channels.count == 10
    assert rows(channels, "stem").eq(FIXED).all() and rows(channels, "down").eq(FIXED).all()
    assert torch.equal(columns(channels, "down"), rows(channels, "up"))


def test_the_model_is_left_as_it_is():
    model, images = make("grouped")
    model.train()
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    analyze_channels(model, images)
    assert model.training and not model.stem.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class CountsOnChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.two(self.one(x).reshape(-1, 8 * 36))


class Sums(nn.Module):
    """Halves of the channels are added: an operation on places of channels, which is not followed."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.one(x)
        return self.two(x[:, :4] + x[:, 4:]).mean((2, 3))


class NotZero(nn.Module):
    """An activation that makes something of nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.two(torch.sigmoid(self.one(x))).mean((2, 3))


def test_a_model_whose_code_counts_channels_is_refused():
    with pytest.raises(ChannelError, match="CountsOnChannels does not run with a part of its channels"):
        analyze_channels(CountsOnChannels(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("kind", [Sums, NotZero])
def test_what_is_not_understood_is_fixed(kind):
    assert analyze_channels(kind(), torch.randn(2, 3, 8, 8)).count == 0


class Shared(nn.Module):
    """One convolution at two places."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.two(F.relu(self.one(x)))))).mean((2, 3)))


def test_a_layer_at_two_places_reads_what_it_makes():
    channels = analyze_channels(Shared(), torch.randn(2, 3, 8, 8))
    assert torch.equal(rows(channels, "one"), rows(channels, "two"))
    assert torch.equal(columns(channels, "two"), rows(channels, "two"))


def test_every_layer_keeps_channels():
    channels = find("plain")
    nothing = torch.zeros(channels.count, dtype=torch.bool)
    rank = torch.arange(channels.count).float()
    kept = channels.with_floor(nothing, 2, rank)
    assert kept.nonzero().flatten().tolist() == [4, 5, 12, 13, 24, 25], "the highest of each layer"
    some = nothing.clone()
    some[0] = True
    assert channels.with_floor(some, 2, rank)[:6].nonzero().flatten().tolist() == [0, 5]


def test_sizes_count_the_layers_that_make_a_unit():
    channels = find("residual")
    stream = rows(channels, "stem.0")
    everything = {place.name for place in channels.weights()}
    assert channels.sizes(everything)[stream].eq(3).all()  # stem, b, and the middle of d
    assert channels.sizes(everything - {"b.0.weight"})[stream].eq(0).all()


@pytest.mark.parametrize("kind", [Residual, Grouped])
def test_inputs_by_name(kind):
    model, images = kind(), torch.randn(2, 3, 8, 8)
    assert analyze_channels(model, {"x": images}).count == analyze_channels(model, (images,)).count > 0
