"""Frozen teachers: opening one, and what it makes of clips."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import SIZES, cast_matrices, plain
from salt import given_paths, hub, vjepa2
from salt.cache_format import agree_on
from salt.checkpoint import load_checkpoint
from salt.encoders import FORMATS, build_encoder, encoder_of_folder, student_of
from salt.errors import InputError
from salt.pretrained import digest_of_weights, read_configuration
from salt.torch_files import from_file, load_pickle
from salt.user_teacher import Shape, check_layers, user_teacher
from salt.videomae import read_videomae

# compute of a teacher that train.py runs on the fly: cache_latents.py's default
TEACHER_DTYPE = "bf16"


class Asked(NamedTuple):
    """How a teacher is asked for its latents."""

    # of its clips, where it takes any [its own]
    frames: int | None = None
    resolution: int | None = None
    # whose outputs are latents, side by side: -1 is what the teacher gives, normed as it norms it;
    # -2 what the last block but one does, layer-normed without weights
    layers: tuple = (-1,)
    # of transformers' image models, of a tubelet's frames: their mean, or the last one's
    of_frames: str = "mean"
    # layer-norm, without weights, what the teacher gives: for those without a final norm
    norm: bool = False

    def to_dict(self):
        """What of it tells latents apart beside their clips; see cache_format.ASKED."""
        return {"layers": list(self.layers), "of_frames": self.of_frames, "norm": self.norm}


AS_IT_IS = Asked()


def load_teacher(path, device="cpu", dtype="fp32", asked=AS_IT_IS):
    """A frozen Encoder in eval mode that computes in `dtype`, 'fp32' or 'bf16', with .name, .sha256
    (of its weights) and .identity, from

    - a VideoMAE or V-JEPA 2 folder in `transformers` format: config.json and model.safetensors or
      pytorch_model.bin, pre-training, fine-tuned, or written by export_transformers;
    - an original VideoMAE .pth: the weights bare or under model, module or state_dict, with or
      without the prefix encoder.; or an original V-JEPA 2 .pt;
    - a checkpoint of train.py;
    - the Hugging Face hub, by its name there;
    or the same as a LayeredTeacher, where other layers are asked for; or, of a folder of any other
    vision model of `transformers` and of `file.py:function`, a UserTeacher.
    Raises InputError, naming what does not fit.
    """
    file, function = given_paths.in_a_file(path)
    if file:
        if asked.to_dict() != AS_IT_IS.to_dict():
            raise InputError(f"{path}: what its latents are its function decides, no flag")
        return user_teacher(file, function, device)
    name = Path(path).name
    if given_paths.of_the_hub(path):
        name, path = path, hub.download(path)
    path = Path(path).expanduser()
    if path.is_dir():
        config, pixels = from_file(path, read_configuration, path)
        if config.get("model_type") not in FORMATS:
            from salt import transformers_teacher

            how = (device, dtype, asked)
            return transformers_teacher.open_folder(path, name, config, pixels, *how)
        encoder, files = encoder_of_folder(path)
    elif path.is_file():
        encoder, files = encoder_of_file(path), [path]
    else:
        raise InputError(given_paths.NOT_THERE["teacher"].format(path))
    if asked.of_frames != "mean":
        raise InputError(f"{name} is a model of videos; --teacher_frames is for models of images")
    if encoder.config.positions == "rope":
        encoder = encoder.at(asked.frames, asked.resolution)
    encoder = encoder.to(device).float().eval().requires_grad_(False)
    cast_matrices(encoder, dtype)
    encoder.name, encoder.sha256 = name, digest_of_weights(files)
    c = plain(encoder.config)
    encoder.identity = {
        "sha256": encoder.sha256,
        "mean": list(c.pop("mean")),
        "std": list(c.pop("std")),
        "compute": dtype,
        "config": c,
        **asked.to_dict(),
    }
    if asked.to_dict() != AS_IT_IS.to_dict():
        return LayeredTeacher(encoder, asked)
    return encoder


def encoder_of_file(path):
    """The Encoder of a checkpoint of train.py, or of an original file of VideoMAE or V-JEPA 2."""
    saved = load_pickle(path)
    if "salt_vla" in saved:
        return student_of(load_checkpoint(path), path)
    if vjepa2.is_original(saved):
        return build_encoder(path, *from_file(path, vjepa2.read_original, saved, path))

    def heads_of(dim, depth):  # 64 channels a head, but for huge and giant
        known = (size[2] for size in SIZES.values() if size[:2] == (dim, depth))
        return next(known, max(1, dim // 64))

    return build_encoder(path, *from_file(path, read_videomae, saved, path, heads_of))


def on_the_fly(path, device, frames, resolution):
    """load_teacher, of the one that runs in training, which takes these clips if it takes any."""
    return load_teacher(path, device, TEACHER_DTYPE, Asked(frames, resolution))


def notes(teacher, path):
    """Lines for a log on what its latents are, where that is not what one expects."""
    whole = getattr(teacher, "encoder", teacher)  # of a LayeredTeacher
    normed = getattr(teacher, "asked", AS_IT_IS).norm
    if not (getattr(whole.config, "final_norm", True) or normed):
        yield (
            f"the teacher {path} has no final norm (use_mean_pooling: its head had it): latents are"
            " the sums of all blocks, of very unequal channels; --teacher_norm norms them, or"
            " train.py --target_norm"
        )
    if getattr(teacher, "note", ""):
        yield teacher.note


class LayeredTeacher:
    """An Encoder whose latents are those of several layers side by side, or normed: all else of it
    is the Encoder's.

    asked  Asked: its layers, each from -1, the last, to -depth, and norm
    """

    def __init__(self, encoder, asked):
        c, self.encoder, self.asked = encoder.config, encoder, asked
        check_layers(asked.layers, c.depth)
        dim = c.dim * len(asked.layers)
        self.config = Shape(c.frames, c.size, c.patch, c.tubelet, dim, c.mean, c.std)
        self.kept = {}
        for layer in {*asked.layers} - {-1}:
            encoder.blocks[layer].register_forward_hook(self.keep(layer))

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def keep(self, layer):
        def hook(block, given, made):
            self.kept[layer] = made

        return hook

    def encode(self, clips):
        """Latents [B, N, len(layers) * D] of clips, as Encoder.encode takes them."""
        last = self.encoder.encode(clips)
        width = last.shape[-1:]
        self.kept[-1] = F.layer_norm(last, width) if self.asked.norm else last
        parts = [
            self.kept[k] if k == -1 else F.layer_norm(self.kept[k], width)
            for k in self.asked.layers
        ]
        self.kept = {}
        return torch.cat(parts, dim=-1).to(last.dtype)


def known_teacher(path, identity, checkpoint, device="cpu"):
    """load_teacher, of the teacher that a checkpoint was trained on, asked and computing as then.

    identity    as the content of `checkpoint`, a path, has it
    Raises InputError where the teacher at `path` is another.
    """
    if identity.get("shown"):
        raise InputError(
            f"{checkpoint} sees other clips than its teacher, whose latents were put on its grid in"
            " the cache (--student_resolution): measure it by a --cache made so"
        )
    shape, own = identity.get("config", {}), AS_IT_IS.to_dict()
    how = {name: identity.get(name, value) for name, value in own.items()}
    if given_paths.in_a_file(path)[0]:
        how = own
    layers = tuple(how["layers"])
    asked = Asked(shape.get("frames"), shape.get("size"), layers, how["of_frames"], how["norm"])
    teacher = load_teacher(path, device, identity.get("compute", "fp32"), asked)
    if not agree_on(identity, teacher.identity):
        raise InputError(
            f"{path} is not the teacher that {checkpoint} was trained on: SHA-256 of the weights"
            f" {teacher.sha256[:12]} there, {identity['sha256'][:12]} in the checkpoint (or"
            " another mean, std, shape or file)"
        )
    return teacher


@torch.no_grad()
def teacher_latents(teacher, clips):
    """A teacher's latents of uint8 clips or patches, [B, N, D]: the same in caching, training and
    evaluation, so without TF32 whatever is set.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return teacher.encode(clips)
    finally:
        torch.set_float32_matmul_precision(before)
