"""Where a sparse weight's nonzeros are: rows, transposed rows, and the permutation between them."""

import torch
from torch import Tensor, nn

from sparse_ft.ops import native


class SparsePattern(nn.Module):
    """The positions of a sparse weight, apart from its values.

    For a weight of shape (O, I/groups, KH, KW), flattened to O rows of K = I/groups * KH * KW columns:

    - `row_ptr` (O + 1) and `col` (nnz): the compressed rows, columns ascending;
    - `t_row_ptr` (stride phases * I + 1), `t_col`, `perm` (nnz): the same entries by (phase of the stride,
      input channel), which makes the input gradient a gather; entry j there is value `perm[j]`, and its
      `t_col` is output-channel-in-group * KH * KW + kernel position.

    All are int32 buffers that move with the module and are never saved: they follow from the mask.
    Make one with `SparsePattern.build`.
    """

    row_ptr: Tensor
    col: Tensor
    t_row_ptr: Tensor
    t_col: Tensor
    perm: Tensor

    def __init__(self, tensors: list[Tensor], shape: tuple[int, ...], stride=(1, 1), padding=(0, 0), dilation=(1, 1),
                 groups: int = 1):  # fmt: skip
        super().__init__()
        self.shape = tuple(shape)
        self.weight_shape = _weight_shape(self.shape)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        for name, tensor in zip(("row_ptr", "col", "t_row_ptr", "t_col", "perm"), tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def build(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        *,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
    ) -> tuple["SparsePattern", Tensor]:
        """The pattern of a dense weight, and its values (nnz,) in the pattern's order.

        Args:
            weight: (out, in) or (O, I/groups, KH, KW); its nonzeros are the pattern unless `mask` is given.
            mask: bool, same shape: True where the weight is trained. Entries under the mask may be 0.0.
            stride, padding, dilation, groups: of the convolution; padding counts rows above and columns left.

        Raises:
            ValueError: for another number of dimensions, a mask of another shape, or 2**31 nonzeros and more.
        """
        if weight.dim() not in (2, 4):
            raise ValueError(f"a sparse pattern needs a 2-D or 4-D weight, got shape {tuple(weight.shape)}")
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(f"mask shape {tuple(mask.shape)} differs from weight shape {tuple(weight.shape)}")
        shape = tuple(weight.shape)
        tensors, values = native.build_pattern(
            weight, mask, (_weight_shape(shape), tuple(stride), tuple(padding), tuple(dilation), groups)
        )
        tensors = [tensor.to(weight.device) for tensor in tensors]
        pattern = cls(tensors, shape, tuple(stride), tuple(padding), tuple(dilation), groups)
        if weight.dtype == torch.float64:  # the core's float32 would round them
            return pattern, pattern.from_dense(weight.detach())
        return pattern, values.to(weight.device, weight.dtype)

    @property
    def nnz(self) -> int:
        return self.col.numel()

    @property
    def tensors(self) -> list[Tensor]:
        """The index tensors in the order that the operators take them."""
        buffers = self._buffers  # not one by one through a module's `__getattr__`
        return [buffers["row_ptr"], buffers["col"], buffers["t_row_ptr"], buffers["t_col"], buffers["perm"]]  # type: ignore[list-item]

    def flat_index(self) -> Tensor:
        """Positions in the flattened dense weight, int64 (nnz,), ascending."""
        return flat_index(self.row_ptr, self.col, self.weight_shape)

    def to_dense(self, values: Tensor) -> Tensor:
        """The dense weight with `values` (nnz,) or (nnz, 1) at the pattern's positions, zero elsewhere."""
        dense = values.new_zeros(self.weight_shape[0] * self.row_length)
        dense[self.flat_index()] = values.reshape(-1)
        return dense.view(self.shape)

    def from_dense(self, weight: Tensor) -> Tensor:
        """The values (nnz,) of a dense weight at the pattern's positions."""
        return weight.reshape(-1)[self.flat_index().to(weight.device)]

    def mask(self) -> Tensor:
        """bool tensor of the dense weight's shape: True at the pattern's positions."""
        dense = torch.zeros(self.weight_shape[0] * self.row_length, dtype=torch.bool, device=self.col.device)
        dense[self.flat_index()] = True
        return dense.view(self.shape)

    @property
    def row_length(self) -> int:
        return self.weight_shape[1] * self.weight_shape[2] * self.weight_shape[3]

    def extra_repr(self) -> str:
        return f"shape={self.shape}, nnz={self.nnz}"


def _weight_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (*shape, 1, 1)


def count_nonzero(weight: Tensor) -> int:
    """`torch.count_nonzero`, which takes several times as long on a CPU as reading the weight."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.is_contiguous():
        return int(torch.count_nonzero(weight))
    threads = native._threads(4 * weight.numel())
    return native._native.count_nonzero(weight.data_ptr(), weight.numel(), threads)


def flat_index(row_ptr: Tensor, col: Tensor, weight_shape) -> Tensor:
    """int64 positions of a pattern's entries in the flattened dense weight."""
    length = weight_shape[1] * weight_shape[2] * weight_shape[3]
    counts = (row_ptr[1:] - row_ptr[:-1]).long()
    rows = torch.repeat_interleave(torch.arange(weight_shape[0], device=col.device), counts, output_size=col.numel())
    return rows * length + col
