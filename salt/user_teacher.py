"""A teacher that a user's Python file makes, `--teacher file.py:function`: its contract, and how it
stands in for an Encoder.

The function returns an object with

    frames, resolution, patch, tubelet   int: the clips it takes, and the tokens it makes of them
    dim             int: numbers in a latent
    mean, std       three numbers each, of pixels in [0, 1]: what a student normalises its own by
    name            str, for a log
    sha256          64 hex digits, of its weights: with the file's, what tells teachers apart
    encode(clips)   uint8 tensor [B, frames, resolution, resolution, 3] -> latents, floats
                    [B, N, dim], token n = (t * h + y) * w + x of the grid (t, h, w) =
                    (frames / tubelet, resolution / patch, resolution / patch); it normalises them
    compute         str, if there is one: noted as part of what it is; --dtype is not its affair

A parameter `device` of the function is given the run's torch.device, where the clips will be.
"""

import functools
import hashlib
import inspect
import math
import re
import sys
import traceback
import types
from pathlib import Path
from typing import NamedTuple

import torch

from model import Encoder
from salt import ops
from salt.errors import InputError, nearest
from salt.views import View, grid_of

WHOLE = ("frames", "resolution", "patch", "tubelet", "dim")
CONTRACT = (*WHOLE, "mean", "std", "name", "sha256", "encode")
ALIKE = 0.05  # share of its norm by which a clip's latents may differ with the batch: rounding


class Shape(NamedTuple):
    """What the stages ask of a teacher's EncoderConfig."""

    frames: int
    size: int
    patch: int
    tubelet: int
    dim: int
    mean: tuple
    std: tuple

    @property
    def grid(self):
        return grid_of(self, self.patch, self.tubelet)


class UserTeacher:
    """A user's object in the place of an Encoder, with all that load_teacher gives one.

    made     what the function returned
    where    file.py:function, as it was given
    file     Path of the first
    digest   SHA-256 of the file
    device   where its clips are
    Raises InputError where it does not keep the contract; it is tried on two clips of noise.
    """

    view_is_known, reshaped, note = False, "", ""
    takes = Encoder.takes  # lines for a log
    other_view = Encoder.other_view

    def __init__(self, made, where, file, digest, device):
        self.made = made
        self.where = where
        self.file = file
        self.config = shape_of(made, where)
        self.view = View(self.config.frames, self.config.size, self.config.size)
        self.grid = self.config.grid
        self.name = made.name
        self.sha256 = made.sha256.lower()
        shape = self.config._asdict()
        self.identity = {
            "sha256": self.sha256,
            "mean": list(shape.pop("mean")),
            "std": list(shape.pop("std")),
            "compute": str(getattr(made, "compute", "its own")),
            "config": shape | {"file_sha256": digest},
        }
        self.try_out(device)

    @torch.no_grad()
    def encode(self, clips):
        """Latents float32 [B, N, D] of uint8 clips [B, T, H, W, 3] or patches [B, N, P], on their
        device. Raises InputError where they have another shape, or are not finite.
        """
        if clips.ndim == 3:
            clips = ops.unpatchify(clips, self.grid, self.config.patch, self.config.tubelet)
        what = f"{self.where}: encode"
        latents = run_theirs(functools.partial(self.made.encode, clips), self.file, what)
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = getattr(latents, "dtype", type(latents).__name__)
            raise InputError(f"{what} returns {kind}; it is to return a tensor of floats")
        expected = [len(clips), math.prod(self.grid), self.config.dim]
        if list(latents.shape) != expected:
            raise InputError(
                f"{what} returns {list(latents.shape)} of {len(clips)} clips, where the grid"
                f" {self.grid} and dim {self.config.dim} make {expected}; mend one of them"
            )
        if not latents.isfinite().all():
            raise InputError(
                f"{what} returns numbers that are not finite; check its weights, and its compute"
                " for overflow"
            )
        return latents.to(clips.device, torch.float32)

    def try_out(self, device):
        """A clip's latents must not depend on chance, nor on what else is in the batch."""
        c = self.config
        random = torch.Generator().manual_seed(0)
        shape = (2, c.frames, c.size, c.size, 3)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(device)
        alone, together = self.encode(clips[:1])[0], self.encode(clips)[0]
        if (alone - together).norm() > ALIKE * together.norm():
            raise InputError(
                f"{self.where}: the latents of a clip differ from call to call, or with the other"
                " clips in the batch; call .eval() on its network (dropout, batch norm)"
            )


def user_teacher(path, name, device):
    """The UserTeacher that function `name` of the file at `path` makes. Raises InputError where
    there is none.
    """
    where, file = f"{path}:{name}", Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"there is no file {file}, which --teacher {where} names")
    source = file.read_bytes()  # what is hashed is what runs: no compiled copy
    module = types.ModuleType(f"teacher_in_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where its classes look for themselves
    sys.path.append(str(file.parent.resolve()))  # what lies beside it can be imported
    run_theirs(lambda: exec(compile(source, file, "exec"), vars(module)), file, f"running {file}")
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = [x for x in vars(module).values() if inspect.isfunction(x)]
        names = [x.__name__ for x in functions if x.__module__ == module.__name__]
        near = nearest(name, names) or f"; it has {', '.join(names) or 'none'}"
        raise InputError(f"--teacher {where} names no function of that file{near}")
    given = {"device": device} if "device" in inspect.signature(function).parameters else {}
    made = run_theirs(functools.partial(function, **given), file, where)
    return UserTeacher(made, where, file, hashlib.sha256(source).hexdigest(), torch.device(device))


def check_layers(layers, depth):
    """Raises InputError where one is not from -1, the last of `depth` blocks, to -depth."""
    for layer in layers:
        if not -depth <= layer <= -1:
            raise InputError(
                f"--teacher_layers {layer}: the teacher has {depth} blocks; the last one is -1, the"
                f" first -{depth}"
            )


def run_theirs(call, file, what):
    """call(), of a user's file, whose errors become one line; SALT_TRACEBACK=1 shows all."""
    try:
        return call()
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [getattr(error, "lineno", None)]  # of a SyntaxError
        frames = traceback.extract_tb(error.__traceback__)
        lines += [frame.lineno for frame in frames if frame.filename == str(file)]
        at = f" at line {lines[-1]}" if lines[-1] else ""
        raise InputError(f"{what} failed{at}: {type(error).__name__}: {error}") from error


def are_three(values, least):
    """Whether these are three numbers above `least`."""
    try:
        return len(values) == 3 and all(least < float(value) < math.inf for value in values)
    except (TypeError, ValueError):
        return False


def shape_of(made, where):
    """The Shape of an object that keeps the contract. Raises InputError where it does not."""
    lacks = [name for name in CONTRACT if not hasattr(made, name)]
    if lacks:
        raise InputError(
            f"{where} returns {type(made).__name__}, which lacks {', '.join(lacks)}; the top of"
            " salt/user_teacher.py says what a teacher has"
        )

    def refuse(name, takes):
        raise InputError(f"{where}: {name} is {getattr(made, name)!r}; it must be {takes}")

    for name in WHOLE:
        value = getattr(made, name)
        if not isinstance(value, int) or value < 1:
            refuse(name, "a whole number of at least 1")
    if not are_three(made.mean, -math.inf):
        refuse("mean", "three numbers, one a colour, of pixels in [0, 1]")
    if not are_three(made.std, 0):
        refuse("std", "three numbers above 0, one a colour, of pixels in [0, 1]")
    if not isinstance(made.name, str) or not made.name.isprintable():
        refuse("name", "a plain str")
    if not re.fullmatch("[0-9a-fA-F]{64}", str(made.sha256)):
        refuse("sha256", "64 hex digits, as salt.files.sha256(path of the weights) gives them")
    if not callable(made.encode):
        refuse("encode", "a method")
    mean, std = (tuple(map(float, values)) for values in (made.mean, made.std))
    shape = Shape(made.frames, made.resolution, made.patch, made.tubelet, made.dim, mean, std)
    try:
        grid_of(shape, shape.patch, shape.tubelet)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return shape
