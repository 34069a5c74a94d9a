"""A norm's few numbers, in one native call where torch would take several."""

import ctypes

import pytest
import torch

from sparse_ft.ops.statistics import reciprocal_deviation, update_running


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_reciprocal_deviation(dtype, eps):
    variance = torch.rand(37, dtype=torch.float64).to(dtype)
    variance[:2] = torch.tensor([0.0, 1e-30])
    want = 1 / (variance.double() + ctypes.c_float(eps).value).sqrt()
    assert torch.equal(reciprocal_deviation(variance, eps), want.to(dtype))


def running_of(channels: int, dtype=torch.float32):
    return torch.tensor(3), (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype))


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 1.0, None])
@pytest.mark.parametrize("count", [2, 128])
def test_update_running(momentum, count):
    batches, running = running_of(37)
    measured = torch.randn(37), torch.rand(37)
    share = 1 / 4 if momentum is None else momentum
    want = running[0].lerp(measured[0], share), running[1].lerp(measured[1] * (count / (count - 1)), share)
    versions = [tensor._version for tensor in (batches, *running)]
    update_running(batches, running, measured, momentum, count)
    assert batches.item() == 4 and batches.dtype == torch.int64
    torch.testing.assert_close(running, want, rtol=1e-6, atol=1e-7)
    # Who has saved one for backward sees that it has changed.
    assert all(tensor._version > before for tensor, before in zip((batches, *running), versions, strict=True))


def test_shares_of_zero_and_one_are_exact():
    batches, running = running_of(37)
    before, measured = [each.clone() for each in running], (torch.randn(37), torch.rand(37))
    update_running(batches, running, measured, 0.0, 128)
    assert torch.equal(running[0], before[0]) and torch.equal(running[1], before[1])
    update_running(batches, running, measured, 1.0, 128)
    assert torch.equal(running[0], measured[0])


@pytest.mark.parametrize(
    "mean", [torch.randn(9, dtype=torch.float64), torch.randn(18)[::2], torch.nn.Buffer(torch.randn(9))]
)
def test_what_the_core_does_not_take(mean):
    batches, variance = torch.tensor(0), torch.rand(9, dtype=mean.dtype)
    measured = torch.randn(9).to(mean.dtype), torch.rand(9).to(mean.dtype)
    want = mean.lerp(measured[0], 0.1), variance.lerp(measured[1] * 1.5, 0.1)
    update_running(batches, (mean, variance), measured, 0.1, 3)
    assert batches.item() == 1
    torch.testing.assert_close(mean.data, want[0].data)
    torch.testing.assert_close(variance, want[1])


def test_statistics_follow_torchs_norm():
    norm, x = torch.nn.BatchNorm2d(5, momentum=None), torch.randn(4, 3, 5, 2, 2)
    batches, running = torch.tensor(0), (torch.zeros(5), torch.ones(5))
    for batch in x:
        norm(batch)
        variance, mean = torch.var_mean(batch, (0, 2, 3), correction=0)
        update_running(batches, running, (mean, variance), None, 12)
    assert batches == norm.num_batches_tracked
    torch.testing.assert_close(running, (norm.running_mean, norm.running_var))


def test_a_mode_sees_the_operations():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    batches, running = running_of(3)
    with Watch():
        update_running(batches, running, (torch.ones(3), torch.ones(3)), 0.1, 4)
    assert seen.count("aten.lerp_.Scalar") == 2 and "aten.add_.Tensor" in seen
