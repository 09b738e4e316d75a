"""An encoder on a stream of frames, as a robot's camera gives them: features of the newest frames
as they come, the past kept and not computed again.

    stream = StreamingEncoder(encoder)
    for frame in camera:                       # uint8 [H, W, 3]
        tokens = stream.push(frame)            # [196, 1024] with every second frame, else None

The encoder was trained to look at all of a clip at once. Here a tubelet looks at itself and at what
came before, so that nothing that was given out changes when the next frame comes; its features
are others than those of a whole clip, and `leak` says how far a clip's own look ahead.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from salt import ops
from salt.errors import InputError
from salt.positions import turn
from salt.video import clip_of_frames


class StreamingEncoder:
    """Features of the newest tubelets of a stream.

    encoder  Encoder, in eval mode; .half(), .bfloat16() and a GPU as ever
    window   frames that a tubelet sees, itself among them: no more than the encoder's own
    hop      frames between two answers, whole tubelets
    causal   True: keys and values of the past are kept, and a tubelet looks at it and at itself,
             block by block, so that features reach further back than the window, a window a
             block; of rotary positions alone, since what a table has added to a token stays there
             when the window moves on. False: the last `window` frames are encoded anew for each
             answer, as in training, and each token looks at all of them; until there are as many,
             the first one stands in for those before it. None: True of rotary positions
    Raises InputError where window, hop or causal do not fit the encoder.
    """

    def __init__(self, encoder, window=None, hop=2, causal=None):
        c = encoder.config
        rotary = c.positions == "rope"
        causal = rotary if causal is None else causal
        if causal and not rotary:
            raise InputError(
                f"the encoder's positions are {c.positions}: a past that is kept cannot move on in"
                " a table; causal=False encodes the window anew, --positions rope trains another"
            )
        window = window or c.frames
        if window % c.tubelet or not 0 < window <= c.frames:
            raise InputError(
                f"window is {window}; it must be a multiple of {c.tubelet} frames, a tubelet, and"
                f" no more than the encoder's {c.frames}"
            )
        if hop % c.tubelet or not 0 < hop <= window:
            raise InputError(
                f"hop is {hop}; it must be a multiple of {c.tubelet} frames, a tubelet, and no more"
                f" than the window's {window}"
            )
        if not causal and window != c.frames:
            encoder = encoder.at(frames=window)
        self.encoder, self.window, self.hop, self.causal = encoder, window, hop, causal
        self.of_one = dataclasses.replace(encoder.view, frames=1, window=(0, 1), view=0)
        self.reset()

    def reset(self):
        """Forget what came so far: a new episode."""
        self.frames = []  # not yet answered for; without causal the window's, too
        self.seen = 0  # tubelets so far
        # keys and values [B, K, 2, H, d] of each block
        self.past: list[Any] = [None] * len(self.encoder.blocks)

    @torch.no_grad()
    def push(self, frame):
        """A frame uint8 [H, W, 3], or one of each of B cameras or robots [B, H, W, 3] ->
        features of the newest `hop` frames, [hop / 2 * h * w, D] or [B, ...], with every hop-th
        frame; else None. Frames of any size are cut as the encoder's clips are.
        """
        alone = frame.ndim == 3
        frames = frame[None] if alone else frame
        if self.frames and len(self.frames[-1]) != len(frames):
            raise InputError(
                f"{len(frames)} frames at a time were pushed, and {len(self.frames[-1])} before;"
                " reset() begins a new stream"
            )
        cut = [clip_of_frames(each[None], self.of_one)[0] for each in frames]
        self.frames.append(torch.stack([torch.from_numpy(each.copy()) for each in cut]))
        made = self.newest() if self.causal else self.anew()
        return made[0] if made is not None and alone else made

    def newest(self):
        """Where a hop is complete, its features by what is kept of the past."""
        if len(self.frames) < self.hop:
            return None
        c, clips = self.encoder.config, torch.stack(self.frames, dim=1)  # [B, hop, h, w, 3]
        self.frames = []
        patches = ops.patchify(clips.to(self.encoder.patch_embed.weight.device), c.patch, c.tubelet)
        count = c.grid[1] * c.grid[2]
        return torch.cat([self.step(each) for each in patches.split(count, dim=1)], dim=1)

    def step(self, patches):
        """Features [B, n, D] of a tubelet's patches uint8 [B, n, P]; kept is what later ones need
        of it.
        """
        encoder, n = self.encoder, patches.shape[1]
        tubelets = self.window // encoder.config.tubelet
        place = min(self.seen, tubelets - 1)  # in the window, which moves on once it is full
        self.seen += 1
        here = torch.arange(place * n, (place + 1) * n, device=patches.device)[None]
        index = torch.arange((place + 1) * n, device=patches.device)[None]  # of the window
        x = encoder.position.added_to(encoder.patch_embed(encoder.normalise(patches)))
        for number, block in enumerate(encoder.blocks):
            qkv = block.attn.queries_keys_values(block.norm1(x))
            q, kept = qkv[:, :, :1], qkv[:, :, 1:]
            if self.past[number] is not None:
                kept = torch.cat([self.past[number], kept], dim=1)
            kept = self.past[number] = kept[:, -tubelets * n :]
            # keys are kept as they are, since their places in the window change as it moves on
            q = turn(q, encoder.position.turned_by(here))[:, :, 0].transpose(1, 2)
            k = turn(kept[:, :, :1], encoder.position.turned_by(index))[:, :, 0].transpose(1, 2)
            found = F.scaled_dot_product_attention(q, k, kept[:, :, 1].transpose(1, 2))
            found = rearrange(found, "b h n d -> b n (h d)")
            x = x + block.attn.proj(found)
            x = x + block.fc2(block.fc1(block.norm2(x)), of=ops.gelu_linear)
        return encoder.norm(x)

    def anew(self):
        """Where a hop is complete, its features in the window's, which is encoded as a clip."""
        self.seen += 1  # frames, here
        self.frames = self.frames[-self.window :]
        if self.seen % self.hop:
            return None
        before = [self.frames[0]] * (self.window - len(self.frames))
        features = self.encoder.encode(torch.stack(before + self.frames, dim=1), pool="time")
        return features[:, -self.hop // self.encoder.config.tubelet :].flatten(1, 2)


@torch.no_grad()
def leak(encoder, clip):
    """How much of a clip's features is owed to frames that come after them: for each tubelet but
    the last, the share of its features' norm by which they change when all later ones are replaced
    by the tubelet's own last frame. A list of floats; of causal features all are 0.

    clip  uint8 [T, H, W, 3]
    """
    clip, per = torch.as_tensor(clip), encoder.config.tubelet
    whole = encoder.encode(clip, pool="time")  # [t, h * w, D]
    found = []
    for place in range(encoder.config.grid[0] - 1):
        last = (place + 1) * per
        cut = torch.cat([clip[:last], clip[last - 1 :][:1].expand(len(clip) - last, -1, -1, -1)])
        other = encoder.encode(cut, pool="time")[place]
        found.append(float((other - whole[place]).norm() / whole[place].norm()))
    return found
