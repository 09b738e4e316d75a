"""The models, from the smallest module to the largest: attention, block, encoder, predictor, the
two together with their loss; then loading and export of students. Shapes are in salt/shapes.py.

The encoder is built as VideoMAE builds it (Tong et al. 2022, arXiv 2203.12602), so that its weights
load from and export to `transformers` unchanged: pre-norm blocks, exact GELU, biases on q and v but
none on k, no cls token; and where its positions are a table, a fixed 1-D sin-cos one. With rotary
positions it is V-JEPA 2's, likewise.
"""

import copy
import dataclasses
import importlib.util
import math
import os
import shutil
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from salt import ops, views
from salt.errors import InputError
from salt.linear import Linear, cast_matrices  # noqa: F401  public here
from salt.masks import FAMILIES, sample_masks  # noqa: F401  likewise
from salt.positions import Positions, turn, turned
from salt.shapes import SIZES, EncoderConfig, config_of_size  # noqa: F401
from salt.torch_files import load_weights

SEEN = "what is seen"  # beside the families: predictions at the context


class Attention(nn.Module):
    """Self-attention within each of `lengths` tokens, [B, K, D] -> [B, K, D], with biases on q and
    v, and with key_bias on k; queries and keys turned by positions.Positions.turned_by.
    """

    def __init__(self, dim, heads, qkv_bias=True, key_bias=False):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        # turned keys make of it more than a number that softmax takes out again
        self.k_bias = nn.Parameter(torch.zeros(dim)) if key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = Linear(dim, dim)

    def queries_keys_values(self, x):
        """[B, K, 3, H, d] of tokens [B, K, D], not yet turned."""
        bias = None
        if self.q_bias is not None:
            of_keys = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
            bias = torch.cat([self.q_bias, of_keys, self.v_bias])
        return rearrange(self.qkv(x, bias), "b n (qkv h d) -> b n qkv h d", qkv=3, h=self.heads)

    def forward(self, x, lengths, turns=None):
        found = ops.attention(turned(self.queries_keys_values(x), turns), lengths)
        return self.proj(rearrange(found, "b n h d -> b n (h d)"))

    def looking_at(self, seen, x, lengths, turns):
        """x [B, K, D] attending to `seen` [B, S, D] alone, of which each pair of `lengths` is apart
        from the others; turns: of both, or None.
        """
        matrix, dim = self.qkv.matrix(), x.shape[-1]
        of_q, of_kv = matrix.split((dim, 2 * dim))
        none = torch.zeros_like(self.v_bias)
        q = ops.linear(x.to(matrix.dtype), of_q, self.q_bias)
        kv = ops.linear(seen.to(matrix.dtype), of_kv, torch.cat([none, self.v_bias]))
        q = rearrange(q, "b n (one h d) -> b n one h d", one=1, h=self.heads)
        kv = rearrange(kv, "b n (kv h d) -> b n kv h d", kv=2, h=self.heads)
        of_x, of_seen = turns or (None, None)
        if of_seen is not None:
            kv = torch.cat([turn(kv[:, :, :1], of_seen), kv[:, :, 1:]], dim=2)
        found = ops.cross_attention(turn(q, of_x)[:, :, 0], kv, lengths)
        return self.proj(rearrange(found, "b n h d -> b n (h d)"))


class Block(nn.Module):
    """A pre-norm transformer block over tokens [B, K, D], of which each `lengths` in turn attend to
    each other; or where some are `seen` to those alone, as Attention.looking_at has it.
    """

    def __init__(self, dim, heads, mlp_dim, eps=1e-6, qkv_bias=True, key_bias=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = Linear(dim, mlp_dim)
        self.fc2 = Linear(mlp_dim, dim)

    def forward(self, x, lengths, turns=None, seen=None):
        if seen is None:
            x = x + self.attn(self.norm1(x), lengths, turns)
        else:
            x = x + self.attn.looking_at(self.norm1(seen), self.norm1(x), lengths, turns)
        return x + self.fc2(self.fc1(self.norm2(x)), of=ops.gelu_linear)


def run_blocks(blocks, x, lengths, turns, recompute=False, seen=None):
    """x [B, K, D] through the blocks; with recompute a block keeps nothing but its input for the
    backward pass, and runs again there.
    """
    for block in blocks:
        x = (
            checkpoint(
                block, x, lengths, turns, seen, use_reentrant=False, preserve_rng_state=False
            )
            if recompute and torch.is_grad_enabled()
            else block(x, lengths, turns, seen)
        )
    return x


def init_weights(module):
    """As VideoMAE: Xavier-uniform matrices, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """ViT over gathered patches: only the tokens given are embedded. `view` cuts its clips."""

    recompute = False
    view_is_known = False  # whether `view` is what its training clips were cut by
    reshaped = ""  # by `at`: a word on the shape of its own clips

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.view = views.View(config.frames, config.size, config.size)  # a checkpoint's: its own
        self.patch_embed = Linear(config.patch_dim, config.dim)
        self.position = Positions(config.positions, config.grid, config.dim, config.heads)
        c = config
        self.blocks = nn.ModuleList(
            Block(c.dim, c.heads, c.mlp_dim, c.eps, c.qkv_bias, c.key_bias) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.eps) if config.final_norm else nn.Identity()
        self.apply(init_weights)

    def normalise(self, patches, index=None):
        """uint8 patches [B, N, P] at index int64 [B, K] (all N by default) -> (x / 255 - mean) /
        std by colour channel, [B, K, P].

        In the dtype that the embedding computes in, or float32 where that is another than bfloat16.
        """
        dtype = self.patch_embed.matrix_dtype()
        dtype = dtype if dtype == torch.bfloat16 else torch.float32
        return ops.patch_normalise(patches, self.config.mean, self.config.std, index, dtype)

    def forward(self, patches, index=None, lengths=None):
        """Normalised float patches [B, K, P] at positions index int64 [B, K] (all N in order by
        default) -> [B, K, D] float32.

        lengths: tokens of each mask where several share the pass (K in sum): tokens of one do not
        see those of another.
        """
        x = self.position.added_to(self.patch_embed(patches), index)
        lengths, turns = lengths or (x.shape[1],), self.position.turned_by(index)
        return self.norm(run_blocks(self.blocks, x, lengths, turns, self.recompute))

    def at(self, frames=None, size=None, interpolated=False):
        """An Encoder of the same weights for clips of another shape, cut as its own are. It shares
        its modules with this one: what converts or moves one of them does so to both.

        frames, size  None: as here
        interpolated  let a table, which is of one grid, be interpolated to the other one: places
                      between two of its tokens are near to both in the sum, which it was not
                      trained on
        Raises InputError where positions are a table's otherwise, or where such clips do not divide
        into patches.
        """
        c = self.config
        shape = {"frames": frames or c.frames, "size": size or c.size}
        if (shape["frames"], shape["size"]) == (c.frames, c.size):
            return self
        if c.positions != "rope" and not interpolated:
            raise InputError(
                f"this encoder's positions are a table of {c.frames} frames of {c.size} pixels;"
                f" it takes no clips of {shape['frames']} of {shape['size']} (but interpolated)"
            )
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.config = dataclasses.replace(c, **shape)
        other.reshaped = f" (its own: {c.frames} of {c.size})"
        other.view = views.View(**shape, short_side=shape["size"]).cut_as(self.view)
        other.position = self.position.on(c.grid, other.config.grid)
        return other

    def encode(self, clips, grad=False, pool=None):
        """Features of all tokens of clips, or of one clip, on the encoder's device.

        clips  uint8 [B, T, H, W, 3] or [T, H, W, 3], an array or a tensor on any device; or their
               patches, [B, N, P] or [N, P]
        grad   keep what a backward pass needs
        pool   None; 'time': tokens apart by time, [B, t, h * w, D]; 'mean': of all, [B, D]
        Returns [B, N, D], or [N, D] of one clip, in the dtype of the weights, token
        n = (t * h + y) * w + x of the grid (t, h, w). Raises InputError on other clips.
        """
        c = self.config
        if pool not in (None, "time", "mean"):
            raise InputError(f"pool is None, 'time' or 'mean', not {pool!r}")
        if not isinstance(clips, torch.Tensor):
            clips = np.array(clips)  # a copy: torch wants rising strides, and to write
            clips = torch.from_numpy(clips) if clips.dtype == np.uint8 else clips
        as_patches = clips.ndim in (2, 3)
        expected = (c.tokens, c.patch_dim) if as_patches else (c.frames, c.size, c.size, 3)
        alone = clips.ndim == len(expected)
        if clips.dtype != torch.uint8 or tuple(clips.shape[not alone :]) != expected:
            raise InputError(self.refusal(clips))
        device = self.patch_embed.weight.device
        clips = torch.as_tensor(clips).to(device)
        patches = clips if as_patches else ops.patchify(clips, c.patch, c.tubelet)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            features = self(self.normalise(patches[None] if alone else patches))
            if pool == "time":
                features = features.unflatten(1, (c.grid[0], -1))
            elif pool == "mean":
                features = features.mean(1)
        return features[0] if alone else features

    def takes(self, view):
        """A line on what it makes of a video that is cut by `view`."""
        c = self.config
        mean, std = (" ".join(f"{x:g}" for x in values) for values in (c.mean, c.std))
        return (
            f"{c.frames} frames of {c.size} pixels{self.reshaped}, normalised by mean {mean}, std"
            f" {std}; clips:"
            f" {view.sampling} sampling, short side {view.short_side}, crop {view.crop},"
            f" {view.interpolation}"
        )

    def other_view(self, view):
        """A line on a teacher whose training clips are known to be cut otherwise than by `view`; ''
        where they are not.
        """
        difference = self.view.difference(view) if self.view_is_known else ""
        return difference and (
            f"warning: the teacher's own clips were cut otherwise ({difference}): its latents of"
            " these are of clips unlike any it has seen"
        )

    def refusal(self, clips):
        """Why `encode` does not take these clips, in a line."""
        c, shape = self.config, list(clips.shape)
        takes = f"{c.frames} of {c.size}x{c.size}"
        if clips.dtype not in (torch.uint8, np.uint8):
            return (
                f"{clips.dtype} {shape} was given; encode takes uint8 frames, as "
                "video.read_clip makes them, and normalises them itself"
            )
        if len(shape) in (4, 5) and shape[-1] == 3:
            frames, height, width = shape[-4:-1]
            return (
                f"{frames} frames of {width}x{height} were given; this encoder takes {takes}: "
                "video.read_clip(path, encoder.view) cuts them, and "
                "video.clip_of_frames(frames, encoder.view) out of frames in memory"
            )
        return (
            f"an array {shape} was given; this encoder takes {takes} as "
            f"[{c.frames}, {c.size}, {c.size}, 3], or their patches "
            f"[{c.tokens}, {c.patch_dim}], with a batch axis in front or without"
        )


class Predictor(nn.Module):
    """Transformer that fills in the target positions from the encoded context; a learnt mask token
    a family. With `seen` a linear head, too, says what is at the context itself. attends: 'all',
    context and targets go through its blocks and look at all; or 'context', targets alone do, and
    look at the context alone (CrossMAE: Fu et al. 2024, arXiv 2401.14391).
    """

    recompute = False

    def __init__(
        self,
        dim_in,
        dim_out,
        tokens,
        families,
        dim=512,
        depth=12,
        heads=8,
        eps=1e-6,
        seen=False,
        positions="table",
        grid=None,
        attends="all",
    ):
        super().__init__()
        if dim % heads:
            raise InputError(
                f"the predictor's width ({dim}) must be a multiple of its heads ({heads})"
            )
        self.families, self.attends = list(families), attends
        self.embed = Linear(dim_in, dim)
        self.mask_tokens = nn.Parameter(torch.zeros(len(self.families), dim))
        if grid is None and positions == "table":  # from before there were others
            grid = (1, 1, tokens)
        if grid is None or math.prod(grid) != tokens:
            raise InputError(f"a predictor's grid {grid} is not one of its {tokens} tokens")
        self.position = Positions(positions, grid, dim, heads)
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.proj = Linear(dim, dim_out)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_tokens, std=0.02)
        # last, so that the other weights of a seed are the same without it
        self.seen = Linear(dim_in, dim_out) if seen else None
        init_weights(self.seen)

    def forward(self, context, masks):
        """context [B, sum Kc, dim_in] of `masks`, one a family, of the same clips -> {family:
        predictions [B, Kt, dim_out]} at each mask's target; with `seen` {SEEN: [B, sum Kc,
        dim_out]}, too.
        """
        counts = [drawn.context.shape[1] for drawn in masks]
        tokens = []
        for drawn, seen in zip(masks, self.embed(context).split(counts, dim=1), strict=True):
            asked = self.mask_tokens[self.families.index(drawn.family)]
            tokens.append(seen)  # [B, Kc, dim]
            tokens.append(asked.expand(*drawn.target.shape, -1))  # [B, Kt, dim]
        sizes = [part.shape[1] for part in tokens]
        index = torch.cat([part for drawn in masks for part in (drawn.context, drawn.target)], 1)
        x = self.position.added_to(torch.cat(tokens, dim=1), index)
        pairs = list(zip(sizes[1::2], sizes[::2], strict=True))  # targets, context of each family
        if self.attends == "all":
            turns, lengths = self.position.turned_by(index), [sum(pair) for pair in pairs]
            x = run_blocks(self.blocks, x, lengths, turns, self.recompute)
            targets = x.split(sizes, dim=1)[1::2]
        else:
            seen, x = (torch.cat(x.split(sizes, dim=1)[k::2], dim=1) for k in (0, 1))
            turns = [
                self.position.turned_by(torch.cat(index.split(sizes, dim=1)[k::2], dim=1))
                for k in (1, 0)
            ]
            x = run_blocks(self.blocks, x, pairs, turns, self.recompute, seen)
            targets = x.split(sizes[1::2], dim=1)
        predictions = {
            drawn.family: self.proj(self.norm(target))
            for drawn, target in zip(masks, targets, strict=True)
        }
        return predictions if self.seen is None else predictions | {SEEN: self.seen(context)}


class Salt(nn.Module):
    """Student and predictor: predictions at the target positions of each family.

    All families go through in one pass. `features`: what the student gave in the last one.
    """

    features: torch.Tensor | None = None

    def __init__(self, student, predictor):
        super().__init__()
        self.student, self.predictor = student, predictor

    def forward(self, patches, masks):
        """patches uint8 [B, N, P], Masks, one a family -> what Predictor gives."""
        index = torch.cat([drawn.context for drawn in masks], dim=1)  # [B, sum Kc]
        lengths = [drawn.context.shape[1] for drawn in masks]
        context = self.student(self.student.normalise(patches, index), index, lengths)
        self.features = context.detach()
        return self.predictor(context, masks)


def salt_loss(
    net, batch, space, kind="mse", weight=1.0, variance=0.0, covariance=0.0, context=0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The SALT loss of a loader.Batch: the mean over mask families of the error at their targets.

    net         Salt, or what wraps one for several ranks
    space       score.Space of the targets
    kind        'mse', 'l1', 'smooth_l1', or another of ops.ERRORS
    weight      of this batch's loss, where it is a part of a larger one
    variance, covariance  weights of VICReg's penalties on the predictions
    context     weight of the same error at the context, over the tokens of all families alike,
                where the predictor has a head for it
    Returns (weight * (loss + context * loss at the context) + penalties, to call backward() on;
    float32 [3] without gradient: loss, squared, spread). squared and spread are the squared errors
    of the predictions and of the per-position mean, summed over the same target elements in
    `space`: R2 = 1 - squared / spread. With the context [5]: these two of it, too.
    """
    predictions = net(batch.patches, batch.masks)
    seen = predictions.pop(SEEN, None)
    y, how = space.raw_targets(batch.patches, batch.latents)
    share = weight / len(predictions)
    losses, errors = [], []
    for drawn in batch.masks:
        prediction, index = predictions[drawn.family], drawn.target
        weighted, error = ops.weighted_mse(prediction, y, index, kind, weight=share, **how)
        with torch.no_grad():
            plain = error if kind == "mse" else ops.masked_mse(prediction, y, index, **how)
            of_mean = ops.masked_mse(space.zero[index], y, index, **how)
        n = prediction.numel()
        losses.append(weighted)
        errors.append((error / len(predictions), plain * n, of_mean * n))
    if variance or covariance:
        penalties = [vicreg(prediction) for prediction in predictions.values()]
        losses += [(variance * v + covariance * c) / len(penalties) for v, c in penalties]
    sums = [sum(values) for values in zip(*errors, strict=True)]
    if seen is not None:
        index = torch.cat([drawn.context for drawn in batch.masks], dim=1)  # [B, sum Kc]
        weighted, error = ops.weighted_mse(seen, y, index, kind, weight=weight * context, **how)
        losses.append(weighted)
        with torch.no_grad():
            plain = error if kind == "mse" else ops.masked_mse(seen, y, index, **how)
            of_mean = ops.masked_mse(space.zero[index], y, index, **how)
        sums += [plain * seen.numel(), of_mean * seen.numel()]
    loss: Any = sum(losses)
    return loss, torch.stack(sums)


def vicreg(prediction, eps=1e-4):
    """Variance and covariance penalties of VICReg (Bardes et al. 2021, arXiv 2105.04906) over all
    predicted tokens [B, K, D].

    variance: mean over channels of max(0, 1 - std); covariance: squared off-diagonal entries,
    summed, over D.
    """
    x = rearrange(prediction.float(), "b k d -> (b k) d")
    variance = F.relu(1 - (x.var(0) + eps).sqrt()).mean()
    x = x - x.mean(0)
    covariance = x.T @ x / (len(x) - 1)  # [D, D]
    return variance, (covariance.square().sum() - covariance.diagonal().square().sum()) / x.shape[1]


def plain(config):
    """A dataclass as a dictionary of tensors and plain types, for a checkpoint."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def weights_of(salt):
    """{"student", "predictor"}: the state_dict of each."""
    return {"student": salt.student.state_dict(), "predictor": salt.predictor.state_dict()}


def load_both(salt, weights, path):
    """The reverse, in place; path: that of the file they are from."""
    load_weights(salt.student, weights["student"], path)
    load_weights(salt.predictor, weights["predictor"], path)


def describe(salt, size, target):
    """A line for the log: sizes of student and predictor, and what is predicted."""

    def millions(module):
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    c = salt.student.config
    return (
        f"student {size} {c.dim}/{c.depth}/{c.heads}, {millions(salt.student):.1f} M parameters;"
        f" predictor {millions(salt.predictor):.1f} M; target {target}"
        f" [{salt.predictor.proj.out_features}]"
    )


def compile_blocks(salt, wanted, device, log):
    """torch.compile over the blocks: where `wanted` is 'on', or 'auto' and `device` is a GPU."""
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    if wanted == "off" or wanted == "auto" and device.type != "cuda":
        return
    can = importlib.util.find_spec("triton") and any(map(shutil.which, compilers))
    if wanted == "auto" and not can:
        log("the blocks are not compiled: torch.compile needs Triton and a C compiler")
        return
    for block in (*salt.student.blocks, *salt.predictor.blocks):
        block.compile(dynamic=False)
    log("torch.compile over the blocks: the first step takes longer")


def build_salt(encoder_config, predictor_config):
    return Salt(Encoder(encoder_config), Predictor(**predictor_config))
