"""Shapes of encoders: what decides one, and the named sizes."""

import dataclasses
import math

from salt import views
from salt.errors import InputError, nearest
from salt.positions import KINDS

SIZES = {  # name: width, blocks, heads, patch, MLP width
    "tiny": (192, 12, 3, 16, 768),
    "small": (384, 12, 6, 16, 1536),
    "base": (768, 12, 12, 16, 3072),
    "large": (1024, 24, 16, 16, 4096),
    "huge": (1280, 32, 16, 16, 5120),
    "giant": (1408, 40, 16, 14, 6144),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. mean and std normalise pixels in [0, 1], a value a colour channel."""

    dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    frames: int = 16
    size: int = 224
    patch: int = 16
    tubelet: int = 2
    eps: float = 1e-6
    qkv_bias: bool = True
    key_bias: bool = False  # likewise on keys, as V-JEPA 2 has
    final_norm: bool = True
    mean: tuple = views.IMAGENET_MEAN
    std: tuple = views.IMAGENET_STD
    positions: str = "table"  # see positions.Positions

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        for name in ("dim", "depth", "heads", "mlp_dim", "frames", "size", "patch", "tubelet"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(
                    f"an encoder's {name} is a whole number of at least 1, not"
                    f" {getattr(self, name)!r}"
                )
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise InputError(
                f"an encoder's mean and std are three numbers each, std above 0; not {self.mean}"
                f" and {self.std}"
            )
        if self.positions not in KINDS:
            raise InputError(
                f"an encoder's positions are {', '.join(KINDS)}, not {self.positions!r}"
            )
        if self.dim % self.heads:
            raise InputError(
                f"an encoder's width ({self.dim}) must be a multiple of its heads ({self.heads})"
            )
        views.grid_of(self, self.patch, self.tubelet)

    @property
    def grid(self):
        return views.grid_of(self, self.patch, self.tubelet)

    @property
    def tokens(self):
        return math.prod(self.grid)

    @property
    def patch_dim(self):
        return 3 * self.tubelet * self.patch * self.patch


def config_of_size(name, **other):
    """EncoderConfig of a named size: tiny, small, base, large, huge or giant."""
    if name not in SIZES:
        raise InputError(
            f"unknown size {name!r}{nearest(name, SIZES)}; there are {', '.join(SIZES)}"
        )
    dim, depth, heads, patch, mlp_dim = SIZES[name]
    return EncoderConfig(
        **{"dim": dim, "depth": depth, "heads": heads, "patch": patch, "mlp_dim": mlp_dim, **other}
    )
