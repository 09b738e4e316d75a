"""A linear layer that computes with a copy of its matrix in another dtype than its weights'."""

import torch
import torch.nn as nn

from salt import ops


class Linear(nn.Linear):
    """x W' + b, computed in the dtype of W, or of its working copy where cast_matrices has made
    one. Sums are in float32.
    """

    # bfloat16 [D, K]; its gradient goes on to the float32 weight
    working: torch.Tensor | None = None
    # with FSDP2: the dtype that each pass casts to, since a matrix is whole only while its block
    # runs
    compute: torch.dtype | None = None

    def __getstate__(self):
        # a copy of the module, or one on disk, makes its own
        return {**self.__dict__, "working": None}

    def _apply(self, fn, recurse=True):
        self.working = None  # or it would stay on the old device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments, **named):
        self.working = None  # or the old weights would go on
        super()._load_from_state_dict(*arguments, **named)

    def matrix(self):
        return (
            self.working
            if self.working is not None
            else self.weight
            if self.compute is None
            else self.weight.to(self.compute)
        )

    def matrix_dtype(self):
        return self.working.dtype if self.working is not None else self.compute or self.weight.dtype

    def forward(self, x, bias=None, of=ops.linear):
        matrix = self.matrix()
        return of(x.to(matrix.dtype), matrix, self.bias if bias is None else bias)


def cast_matrices(module, dtype):
    """Have a model compute with copies of its matrices in `dtype`, 'bf16', until the next call;
    'fp32' drops them.

    In training this is called once a step: each gradient is made in bfloat16, as under autocast,
    and added up in float32. Biases, norms and the residual stream stay in float32.
    """
    for linear in module.modules():
        if isinstance(linear, Linear) and hasattr(linear.weight, "full_tensor"):
            linear.compute = torch.bfloat16 if dtype == "bf16" else None
        elif isinstance(linear, Linear):
            linear.working = linear.weight.to(torch.bfloat16) if dtype == "bf16" else None
