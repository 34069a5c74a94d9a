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


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("correction", [1.0, 128 / 127])
def test_update_running(momentum, correction):
    running, measured = torch.randn(37), torch.randn(37)
    want = running.lerp(measured * correction, momentum)
    version = running._version
    update_running(running, measured, momentum, correction)
    torch.testing.assert_close(running, want, rtol=1e-6, atol=1e-7)
    assert running._version > version  # who has saved it for backward sees that it has changed
    if momentum == 0.0 or (momentum == 1.0 and correction == 1.0):
        assert torch.equal(running, want)


@pytest.mark.parametrize(
    "running", [torch.randn(9, dtype=torch.float64), torch.randn(18)[::2], torch.nn.Buffer(torch.randn(9))]
)
def test_what_the_core_does_not_take(running):
    measured = torch.randn(9).to(running.dtype)
    want = running.lerp(measured * 1.5, 0.1)
    update_running(running, measured, 0.1, 1.5)
    torch.testing.assert_close(running.data, want.data)


def test_a_mode_sees_the_operations():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        update_running(torch.zeros(3), torch.ones(3), 0.1)
    assert "aten.lerp_.Scalar" in seen
