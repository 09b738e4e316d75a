"""EfficientNet's blocks 7 and 10 side by side, each layer-normed: a teacher of two layers."""

import torch
from torch.nn.functional import layer_norm

from examples.teacher_efficientnet import EfficientNet


def tiny(device):
    """[4, 7, 7] latents of 80 + 112 numbers, out of 8 frames of 112 pixels."""
    return TwoBlocks(device)


class TwoBlocks:
    name, tubelet, compute, patch = "efficientnet-lite0, two blocks", 2, "fp32", 16
    frames, resolution, dim = 8, 112, 80 + 112

    def __init__(self, device):
        self.parts = [
            EfficientNet(device, self.frames, self.resolution, block) for block in (7, 10)
        ]
        self.mean, self.std, self.sha256 = (
            getattr(self.parts[0], name) for name in ("mean", "std", "sha256")
        )

    def encode(self, clips):
        """uint8 [B, 8, 112, 112, 3] -> float32 [B, 4 * 7 * 7, 192]."""
        found = [part.encode(clips) for part in self.parts]
        return torch.cat([layer_norm(x, x.shape[-1:]) for x in found], dim=-1)
