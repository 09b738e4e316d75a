"""Frozen teachers: opening one, and what it makes of clips."""

from pathlib import Path

import torch

from model import SIZES, build_encoder, cast_matrices, encoder_of_folder, plain, student_of
from salt import given_paths
from salt.cache_format import agree_on
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from salt.files import sha256
from salt.torch_files import from_file, load_pickle
from salt.user_teacher import user_teacher
from salt.videomae import read_videomae

# compute of a teacher that train.py runs on the fly: cache_latents.py's default
TEACHER_DTYPE = "bf16"


def load_teacher(path, device="cpu", dtype="fp32"):
    """A frozen Encoder in eval mode that computes in `dtype`, 'fp32' or 'bf16', with .name, .sha256
    (of its weights file) and .identity, from

    - a folder in `transformers` format: config.json and model.safetensors or pytorch_model.bin,
      pre-training, fine-tuned, or written by export_transformers;
    - an original VideoMAE .pth: the weights bare or under model, module or state_dict, with or
      without the prefix encoder.;
    - a checkpoint of train.py;
    or, of `file.py:function`, the UserTeacher of what that returns, which computes as it likes.
    Raises InputError, naming what does not fit.
    """
    file, function = given_paths.in_a_file(path)
    if file:
        return user_teacher(file, function, device)
    path = Path(path).expanduser()
    if path.is_dir():
        encoder, file = encoder_of_folder(path)
    elif path.is_file():
        saved, file = load_pickle(path), path
        if "salt_vla" in saved:
            encoder = student_of(load_checkpoint(path), path)
        else:  # 64 channels a head, but for huge and giant

            def heads_of(dim, depth):
                return next(
                    (size[2] for size in SIZES.values() if size[:2] == (dim, depth)),
                    max(1, dim // 64),
                )

            found = from_file(path, read_videomae, saved, path, heads_of)
            encoder = build_encoder(path, *found)
    else:
        raise InputError(given_paths.NOT_THERE["teacher"].format(path))
    encoder.name, encoder.sha256 = path.name, sha256(file)
    c = plain(encoder.config)
    encoder.identity = {
        "sha256": encoder.sha256,
        "mean": list(c.pop("mean")),
        "std": list(c.pop("std")),
        "compute": dtype,
        "config": c,
    }
    encoder = encoder.to(device).float().eval().requires_grad_(False)
    cast_matrices(encoder, dtype)
    return encoder


def known_teacher(path, identity, checkpoint, device="cpu"):
    """load_teacher, of the teacher that a checkpoint was trained on and in that one's compute.

    identity    as the content of `checkpoint`, a path, has it
    Raises InputError where the teacher at `path` is another.
    """
    teacher = load_teacher(path, device, identity.get("compute", "fp32"))
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
