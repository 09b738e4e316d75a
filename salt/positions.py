"""Where a token stands in its clip: a table that is added to it, or angles by which attention turns
its queries and keys.
"""

import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from salt.errors import InputError

KINDS = ("table", "table3d", "rope")
MAX_TABLE = 2**27  # numbers in a position table: 60 times those of giant


class Positions(nn.Module):
    """What is known of the places of tokens on a grid (t, h, w), n = (t * h + y) * w + x.

    kind   'table': of n, VideoMAE's; 'table3d': of t, y and x; both are added to tokens. 'rope':
           V-JEPA 2's rotations by t, y and x (Assran et al. 2025, arXiv 2506.09985)
    dim    of tokens; heads: of the attention that looks at them
    Raises InputError where a head is too narrow for 'rope' or its width odd, or the grid huge.
    """

    table: torch.Tensor | None
    turns: torch.Tensor | None

    def __init__(self, kind, grid, dim, heads):
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"positions are {', '.join(KINDS)}, not {kind!r}")
        if math.prod(grid) * dim > MAX_TABLE:
            raise InputError(
                f"{math.prod(grid)} tokens of width {dim} are more than any model here has; is its "
                "configuration damaged?"
            )
        table = turns = None
        if kind == "table":
            table = position_table(math.prod(grid), dim)
        elif kind == "table3d":
            table = table_3d(grid, dim)
        else:
            turns = rotations(grid, dim // heads)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("turns", turns, persistent=False)

    def on(self, grid, other):
        """The Positions of another grid: rotations of whole places, or this one's table, which is
        of `grid`, interpolated to it by trilinear interpolation.
        """
        made = copy.copy(self)
        made._buffers = dict(self._buffers)
        if self.table is None:
            made.turns = rotations(other, self.turns.shape[-1]).to(self.turns)
        else:
            laid_out = rearrange(self.table, "(t h w) d -> 1 d t h w", t=grid[0], h=grid[1])
            table = F.interpolate(laid_out.float(), size=other, mode="trilinear")
            made.table = rearrange(table, "1 d t h w -> (t h w) d").to(self.table)
        return made

    def added_to(self, x, index=None):
        """Tokens x [B, K, dim] at index int64 [B, K] (all N in order by default), with the table
        added where there is one: in the dtype of the weights, float32 in training. x as bfloat16
        products leave it would make all that blocks add to it bfloat16.
        """
        if self.table is None:
            return x.to(self.turns.dtype)
        return x + (self.table if index is None else self.table[index])

    def turned_by(self, index=None):
        """What `turned` takes for them: float32 [2, B or 1, K, 1, 1, d], or None."""
        if self.turns is None:
            return None
        turns = self.turns[:, None] if index is None else self.turns[:, index]
        return turns[:, :, :, None, None]


def position_table(tokens, dim):
    """float32 [tokens, dim]: sin on even, cos on odd channels of n / 10000^(2 (j // 2) / dim)
    (Vaswani et al. 2017, arXiv 1706.03762).
    """
    angle = np.arange(tokens)[:, None] / np.power(10000.0, 2 * (np.arange(dim) // 2) / dim)
    angle[:, 0::2], angle[:, 1::2] = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    return torch.from_numpy(angle.astype(np.float32))


def table_3d(grid, dim):
    """float32 [t * h * w, dim]: the table of t on a quarter of the channels, those of y and x on
    three eighths each.
    """
    time = 2 * (dim // 8)
    across = 2 * ((dim - time) // 4)
    widths = (time, across, dim - time - across)
    tables = [position_table(n, width) for n, width in zip(grid, widths)]
    return torch.cat([table[at] for table, at in zip(tables, places(grid))], dim=1)


def rotations(grid, width):
    """float32 [2, t * h * w, width]: cos and sin of the angles that `turned` turns a head by.

    A third of the channels each, rounded down to even numbers of them, is for t, y and x, and what
    is left is not turned. Channel j of a third of d has the angle place / 10000^((j mod d/2) /
    (d/2)): as in V-JEPA 2's code (facebookresearch/vjepa2, src/models/utils/modules.py), whose
    table of d/2 frequencies is repeated while neighbours are the pairs that turn, so that the two
    of a pair turn by different angles.
    """
    third = 2 * (width // 3 // 2)
    if third < 2 or width % 2:
        raise InputError(
            f"rotary positions need attention heads of an even width of at least 6, not {width}:"
            " another width or number of heads (--size, --predictor_dim, --predictor_heads)"
        )
    frequency = np.power(10000.0, -2 * (np.arange(third) % (third // 2)) / third)
    angles = [at[:, None] * frequency for at in places(grid)]
    angles.append(np.zeros((math.prod(grid), width - 3 * third)))
    angle = np.concatenate(angles, axis=1)
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32))


def places(grid):
    """int64 [3, t * h * w]: t, y and x of the tokens of a grid."""
    return np.indices(grid).reshape(3, -1)


def turned(qkv, turns):
    """qkv [B, K, 3, H, d] with each query and key turned: the channels 2i and 2i + 1 of one, (a, b)
    -> (a cos - b sin, b cos' + a sin'), in float32.

    turns  what Positions.turned_by gives for the K tokens; None: as they are
    """
    if turns is None:
        return qkv
    return torch.cat([turn(qkv[:, :, :2], turns), qkv[:, :, 2:]], dim=2)


def turn(looks, turns):
    """The same of queries or keys alone, [B, K, n, H, d]."""
    if turns is None:
        return looks
    cos, sin = turns
    exact = looks.float()
    across = torch.stack([-exact[..., 1::2], exact[..., 0::2]], dim=-1).flatten(-2)
    return (exact * cos + across * sin).to(looks.dtype)
