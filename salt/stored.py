"""Latents as a cache stores them, float16 or int8, and their statistics."""

import io

import numpy as np
import torch

from salt import ops
from salt.errors import InputError
from salt.files import write_whole

FLOAT16_MAX = 65504.0


def to_stored(latents, dtype, names=None):
    """Latents float [B, N, D], on any device, of the videos `names`, as a cache of `dtype` keeps
    them.

    Returns numpy arrays by kind: latents float16 [B, N, D]; or latents int8 [B, N, D] with tokens
    float32 [B, N, 1], the root mean square of each token, and scales float32 [B, 1, D], the largest
    magnitude of a channel over its tokens' / 127, so that neither a token that is large in every
    channel nor a channel that is large in every token takes the others' digits (docs/DATA.md has
    figures).
    Raises InputError on a latent beyond float16, which is never stored as infinity.
    """
    latents = latents.float()
    largest = latents.abs().amax(1, keepdim=True)  # [B, 1, D]
    if not (top := largest.max().item()) <= FLOAT16_MAX:
        worst = [
            f" of the video {name!r}"
            for name, value in zip(names or (), largest.amax((1, 2)).tolist())
            if not value <= FLOAT16_MAX
        ]
        raise InputError(
            f"the teacher's latents{worst[0] if worst else ''} reach {top}, beyond float16"
            f" ({FLOAT16_MAX:.0f}); check the teacher's weights, or its compute (--dtype)"
        )
    if dtype == "float16":
        return {"latents": latents.half().cpu().numpy()}
    tokens = latents.square().mean(2, keepdim=True).sqrt()
    tokens = torch.where(tokens > 0, tokens, 1.0)
    scales = (latents / tokens).abs().amax(1, keepdim=True) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    entries = (latents / (scales * tokens)).round().clamp(-127, 127).to(torch.int8)
    return {
        "latents": entries.cpu().numpy(),
        "scales": scales.cpu().numpy(),
        "tokens": tokens.cpu().numpy(),
    }


def from_stored(stored):
    """float16 [..., N, D]: latents as a reader gets them, from what to_stored gives, of a batch or
    of one clip.
    """
    if "scales" not in stored:
        return stored["latents"]
    parts = {kind: torch.from_numpy(array).float() for kind, array in stored.items()}
    return (parts["latents"] * parts["scales"] * parts["tokens"]).half().numpy()


class Moments:
    """Count, mean and summed squared deviations of latents, float64, clip after clip."""

    def __init__(self, shape):
        self.count = 0
        self.sum = np.zeros(shape)
        self.squares = np.zeros(shape)

    def add(self, latents):
        ops.add_moments(latents[None], self.sum, self.squares)
        self.count += 1

    def save(self, path):
        content, mean = io.BytesIO(), self.sum / max(1, self.count)
        np.savez(
            content,
            mean=mean.astype(np.float32),
            m2=np.maximum(0, self.squares - self.count * mean * mean).astype(np.float32),
            count=self.count,
        )
        write_whole(path, content.getvalue())


def load_moments(path):
    with np.load(path) as part:
        return int(part["count"]), part["mean"].astype(np.float64), part["m2"].astype(np.float64)


def join_statistics(parts):
    """Mean and variance of all parts (count, mean, m2), by Chan, Golub and LeVeque's update (1979),
    in order and float64.
    """
    count = 0
    mean = 0.0
    m2 = 0.0
    for n, part_mean, part_m2 in parts:
        if n:
            delta, total = part_mean - mean, count + n
            mean = mean + delta * (n / total)
            m2 = m2 + part_m2 + delta * delta * (count * n / total)
            count = total
    return {"mean": np.float32(mean), "variance": np.float32(m2 / count), "count": np.int64(count)}
