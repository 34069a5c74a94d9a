"""What torch.library promises of the operators: schemas, shape rules, gradients, tracing."""

import pytest
import torch
from oracle import DTYPES, ROUNDING, pattern_of, sparse_weight

from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS, Activation

GEOMETRY = ((2, 1), (1, 0, 1, 2), (1, 1), 2)
SHAPE = (4, 3, 3, 3)
MAXIMUM = ([-1, 1, 3], [0, 2], (2, 3), (2, 1))
AVERAGE = ([0, 2], [4, 6], [0.25, 0.25], [0, 1, 4], [1, 4, 5], [1.0, 0.5, 1.0])
DIFFERENTIABLE = (
    "linear", "conv2d", "norm_conv2d", "norm_depthwise", "conv2d_norm", "batch_norm", "max_pool2d",
    "norm_max_pool2d", "avg_pool2d", "to_layout", "dropout",
)  # fmt: skip


def _samples(name: str, dtype: torch.dtype, weights: torch.dtype | None = None) -> list[tuple]:
    """Arguments of an operator, one tuple for each of its forms; weights and statistics may have another type."""
    weights = weights or dtype
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        x = torch.randn(shape, generator=generator).to(dtype if len(shape) > 1 else weights)
        return x.requires_grad_(name in DIFFERENTIABLE)

    def weight(shape, **geometry):
        pattern, values = pattern_of(sparse_weight(shape, 0.4, generator), **geometry)
        values = values.view(-1, 1).to(weights)
        return pattern.tensors, values.requires_grad_(name in DIFFERENTIABLE)

    line, line_values = weight((5, 7))
    index, values = weight(SHAPE, stride=GEOMETRY[0], padding=GEOMETRY[1], groups=2)
    linear, conv = (line, 7, 5), (index, SHAPE, *GEOMETRY)
    deep_index, deep_values = weight((6, 1, 3, 3), stride=GEOMETRY[0], padding=GEOMETRY[1], groups=6)
    depthwise = (deep_index, (6, 1, 3, 3), *GEOMETRY[:3], 6)
    image, grad = (3, 6, 6, 5), (3, 4, 3, 5)
    mean, variance = (torch.rand(6, generator=generator).to(weights) + 0.5 for _ in range(2))
    return {
        "linear": [(leaf(2, 3, 7), line_values, bias, *linear) for bias in (leaf(5), None)],
        "linear_input_grad": [(leaf(2, 3, 5), line_values, *linear)],
        "linear_weight_grad": [(leaf(2, 3, 5), leaf(2, 3, 7), *linear)],
        "linear_weight_bias_grad": [(leaf(2, 3, 5), leaf(2, 3, 7), *linear)],
        "conv2d": [(leaf(*image), values, bias, *conv) for bias in (leaf(4), None)],
        "conv2d_input_grad": [(leaf(*grad), values, *conv, list(image))],
        "conv2d_weight_grad": [(leaf(*grad), leaf(*image), *conv)],
        "norm_conv2d": [
            (leaf(*image), leaf(6), leaf(6), mean, variance, activation, False, values, bias, *conv)
            for activation in Activation
            for bias in (leaf(4), None)
        ]
        + [(leaf(*image), None, None, mean, variance, 1, False, values, None, *conv)],
        "conv2d_norm": [
            (leaf(*image), values, bias, *conv, leaf(4), leaf(4), mean[:4], variance[:4], 1e-5, residual, activation)
            for activation in (0, 1, 3)
            for bias, residual in ((leaf(4), None), (None, leaf(*grad)))
        ]
        + [(leaf(*image), values, None, *conv, None, None, None, None, 0.0, leaf(*grad), 1)],
        "norm_conv2d_weight_grad": [
            (leaf(*grad), leaf(*image), leaf(6), leaf(6), mean, variance, activation, *conv)
            for activation in (0, 1, 3)
        ],
        "norm_depthwise": [
            (leaf(*image), leaf(6), leaf(6), mean, variance, activation, False, deep_values, bias, *depthwise)
            for activation in Activation
            for bias in (leaf(6), None)
        ]
        + [(leaf(*image), None, None, mean, variance, 1, False, deep_values, None, *depthwise)],
        "norm_depthwise_backward": [
            (
                leaf(3, 6, 3, 5),
                leaf(3, 6, 3, 5),
                leaf(6),
                leaf(6),
                mean,
                variance,
                outer,
                leaf(*image),
                leaf(6),
                leaf(6),
                mean,
                variance,
                inner,
                inner == 1,
                deep_values,
                *depthwise,
            )
            for outer, inner in ((0, 1), (1, 4), (3, 2))
        ]
        + [
            (
                leaf(3, 6, 3, 5),
                leaf(3, 6, 3, 5),
                None,
                None,
                mean,
                variance,
                1,
                leaf(*image),
                None,
                None,
                mean,
                variance,
                1,
                True,
                deep_values,
                *depthwise,
            )
        ],
        "batch_norm": [
            (leaf(*image), leaf(6), leaf(6), None, None, 1e-5),
            (leaf(*image), None, None, None, None, 1e-5),
            (leaf(*image), leaf(6), leaf(6), mean, variance, 1e-5),
            *(
                (leaf(*image), leaf(6), leaf(6), *given, 1e-5, residual, activation)
                for activation in Activation
                for residual in (None, leaf(*image))
                for given in ((None, None), (mean, variance))
            ),
        ],
        "batch_norm_statistics": [(leaf(*image),)],
        "batch_norm_backward": [
            (leaf(*image), leaf(*image), leaf(6), leaf(6), mean, variance, None, None, 0, True),
            (leaf(*image), leaf(*image), None, None, mean, variance, None, leaf(*image), 1, False),
            (leaf(*image), leaf(*image), leaf(6), None, mean, variance, leaf(*image), None, 3, True),
        ],
        "max_pool2d": [(leaf(*image), *MAXIMUM)],
        "max_pool2d_backward": [
            (leaf(3, 6, 3, 2), torch.tensor([1, 2, 4] * 36, dtype=torch.uint8).view(3, 6, 3, 2), *MAXIMUM, list(image))
        ],
        "norm_max_pool2d": [
            (leaf(*image), leaf(6), leaf(6), mean, variance, 4, False, *MAXIMUM),
            (leaf(*image), None, None, mean, variance, 1, False, *MAXIMUM),
        ],
        "norm_max_pool2d_backward": [
            (
                leaf(3, 6, 3, 2),
                torch.tensor([1, 2, 4] * 36, dtype=torch.uint8).view(3, 6, 3, 2),
                *(leaf(*image), leaf(6), None, mean, variance, 1, training, *MAXIMUM),
            )
            for training in (True, False)
        ],
        "avg_pool2d": [(leaf(*image), *AVERAGE)],
        "avg_pool2d_backward": [(leaf(3, 6, 2, 3), *AVERAGE, list(image))],
        "to_layout": [(leaf(*image), layout) for layout in (CONTIGUOUS, CHANNELS_LAST, BATCH_LAST)],
        "dropout": [(leaf(*shape), p, seed) for shape, p, seed in (((3, 7), 0.5, 1), (image, 0.25, -1))],
    }[name]


NAMES = [
    "linear", "linear_input_grad", "linear_weight_grad", "linear_weight_bias_grad", "conv2d", "conv2d_input_grad",
    "conv2d_weight_grad", "norm_conv2d", "norm_conv2d_weight_grad", "norm_depthwise", "norm_depthwise_backward",
    "conv2d_norm", "batch_norm", "batch_norm_statistics", "batch_norm_backward",
    "max_pool2d", "max_pool2d_backward", "norm_max_pool2d", "norm_max_pool2d_backward", "avg_pool2d",
    "avg_pool2d_backward", "to_layout",
    "dropout",
]  # fmt: skip


def test_every_operator_is_tested():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparse_ft::")}
    assert registered == {f"sparse_ft::{name}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(t, t) for t in (torch.float32, torch.float64, torch.bfloat16)] + [(torch.bfloat16, torch.float32)],
)
def test_opcheck(name, dtype, weights):
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if weights == torch.float32:
        utilities += ["test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    for args in _samples(name, dtype, weights):
        torch.library.opcheck(getattr(torch.ops.sparse_ft, name).default, args, test_utils=utilities)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_reference_backend(name):
    """float64 has no native form: these are the plain torch formulas, which run on every other device too."""
    for args in _samples(name, torch.float64):

        def first_output(*args):
            output = getattr(torch.ops.sparse_ft, name)(*args)
            return output if isinstance(output, torch.Tensor) else output[0]

        assert torch.autograd.gradcheck(first_output, args, fast_mode=True)


@pytest.mark.parametrize("name", ["linear", "conv2d", "batch_norm"])
def test_a_second_derivative_is_an_error(name):
    """Never a wrong one."""
    args = _samples(name, torch.float32)[0]
    output = getattr(torch.ops.sparse_ft, name)(*args)
    output = output if isinstance(output, torch.Tensor) else output[0]
    (grad,) = torch.autograd.grad(output.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(isa, dtype):
    """The native products, with activations of either type, and the reference in float64."""
    for name in NAMES:
        for args in _samples(name, dtype, torch.float32):
            wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
            got, want = (getattr(torch.ops.sparse_ft, name)(*a) for a in (args, wide))
            for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
                # A norm's gradient may be stored twice; what lies between a norm and a convolution is rounded as if it
                # were stored, and may be larger than the result.
                near = (8 if "norm_conv2d" in name or "conv2d_norm" in name or "depthwise" in name else 2) * ROUNDING[
                    dtype
                ]
                near = near if a.is_floating_point() else 0
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-4 + near, atol=1e-5 + near)
