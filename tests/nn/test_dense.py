"""Dense convolutions beside sparse ones: the stock results in every layout."""

import pickle

import pytest
import torch
from torch import nn

from sparse_ft.nn import LayoutConv, follow_layout, restore_stock
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS, is_batch_last


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST, BATCH_LAST])
@pytest.mark.parametrize("groups", [1, 4])
def test_results_are_the_stock_ones_in_every_layout(layout: int, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(6, 4, 9, 7, requires_grad=True)
    expected = conv(x)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, conv.weight, conv.bias], grad)
    assert follow_layout(conv)
    placed = torch.ops.sparse_ft.to_layout(x, layout)
    y = conv(placed)
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, [x, conv.weight, conv.bias], grad), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert is_batch_last(y)


def test_only_the_stock_class_is_changed_and_changed_back() -> None:
    class Own(nn.Conv2d):
        pass

    own, stock = Own(2, 2, 1), nn.Conv2d(2, 2, 1)
    assert not follow_layout(own) and type(own) is Own
    assert follow_layout(stock) and isinstance(stock, LayoutConv)
    restore_stock(stock)
    assert type(stock) is nn.Conv2d


def test_unbatched_input() -> None:
    conv = nn.Conv2d(3, 5, 3)
    x = torch.randn(3, 8, 8)
    expected = conv(x)
    follow_layout(conv)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("layout", [CHANNELS_LAST, BATCH_LAST])
def test_timm_padding_and_pickle(layout: int) -> None:
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    conv = Conv2dSame(4, 4, 3, stride=2, groups=4)
    x = torch.randn(6, 4, 9, 7)
    expected = conv(x)
    assert follow_layout(conv) and isinstance(conv, LayoutConv)
    y = pickle.loads(pickle.dumps(conv))(torch.ops.sparse_ft.to_layout(x, layout))
    torch.testing.assert_close(y, expected)
    assert is_batch_last(y)
    restore_stock(conv)
    assert type(conv) is Conv2dSame
