"""A checkpoint on disk: there whole or not at all, and read only where it is one."""

import os
import shutil
from pathlib import Path

import torch

from salt.errors import InputError
from salt.torch_files import load_pickle

CHECKPOINT_VERSION = 1
CHECKPOINT_PARTS = (
    "student",
    "predictor",
    "encoder_config",
    "predictor_config",
    "space",
    "settings",
    "view",
    "identity",
    "teacher",
    "step",
)


def save_checkpoint(path, content, previous=None):
    """torch.save beside `path`, flush to the disk, rename; what was there becomes `previous`, where
    one is named.

    Raises InputError where the disk is full; the old file then stands.
    """
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            torch.save({"salt_vla": CHECKPOINT_VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.isfile(path):
            os.replace(path, previous)
        os.replace(part, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, survives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if "CUDA" in str(error):  # of a kernel before, seen only now
            raise
        full = (
            isinstance(error, RuntimeError)
            and shutil.disk_usage(os.path.dirname(path) or ".").free < 1 << 20
        )
        Path(part).unlink(missing_ok=True)
        raise InputError(
            f"the checkpoint {path} could not be written"
            f" ({'No space left on device' if full else str(error).splitlines()[0]}); see to its"
            " disk and continue with --resume auto"
        ) from None


def load_checkpoint(path, ema=False):
    """The content of best.pth or last.pth; with ema its moving average stands in place of student
    and predictor. Raises InputError on anything else.
    """
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; name its best.pth or last.pth")
    if not Path(path).is_file():
        raise InputError(f"there is no checkpoint {path}")
    saved = load_pickle(path)
    if saved.get("salt_vla") != CHECKPOINT_VERSION:
        found = saved.get("salt_vla")
        raise InputError(
            f"{path} is not a checkpoint of train.py"
            if found is None
            else f"{path} has checkpoint format {found}, this code reads {CHECKPOINT_VERSION}"
        )
    missing = [name for name in CHECKPOINT_PARTS if name not in saved]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; it is no whole checkpoint of train.py"
        )
    if ema and "ema" not in saved:
        raise InputError(
            f"{path} holds no moving average of the weights: it was trained without --ema"
        )
    return saved | saved["ema"] if ema else saved
