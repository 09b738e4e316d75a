"""Encoders from the disk and to it: checkpoints of train.py, and folders that others read."""

import functools
from pathlib import Path

from model import Encoder, Predictor, Salt
from salt import plain_folder, videomae, views, vjepa2
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from salt.pretrained import read_configuration
from salt.score import Space
from salt.shapes import EncoderConfig
from salt.torch_files import from_file, restored


def load_encoder(path, device="cpu", ema=False):
    """The student of best.pth or last.pth, or what export_transformers wrote; in eval mode, fp32.

    ema: the moving average of the student's weights. video.read_clip(path, encoder.view) cuts
    clips as they were cut in training.
    """
    if (Path(path) / "config.json").is_file():
        if ema:
            raise InputError(
                f"{path} is an exported encoder, which holds no moving average beside "
                "its weights; leave ema out"
            )
        encoder, _ = encoder_of_folder(Path(path))
    else:
        encoder = student_of(load_checkpoint(path, ema), path)
    return encoder.to(device).eval()


def build_encoder(path, fields, state, view=None):
    """An Encoder of EncoderConfig fields, weights and, where known, View fields, out of `path`."""
    config = from_file(path, EncoderConfig, **fields)
    encoder = restored(path, state, config.depth, functools.partial(Encoder, config))
    if view is not None:
        encoder.view, encoder.view_is_known = from_file(path, views.View.from_dict, view), True
    return encoder


# by the model_type of a folder
FORMATS = {"videomae": videomae, "vjepa2": vjepa2, "salt_vla": plain_folder}


def encoder_of_folder(path):
    """(Encoder, its weights files) of a folder in `transformers` format."""
    config, pixels = from_file(path, read_configuration, path)
    kind = config.get("model_type")
    if kind not in FORMATS:
        raise InputError(
            f"{path / 'config.json'} describes the model type {kind!r}; a teacher is a"
            f" {' or a '.join(FORMATS)}"
        )
    found = from_file(path, FORMATS[kind].read_folder, config, pixels, path)
    fields, state, files, view, is_known = found
    encoder = build_encoder(path, fields, state, view)
    encoder.view_is_known = is_known
    return encoder, files


def student_of(saved, path):
    """The student of a loaded checkpoint."""
    return build_encoder(path, saved["encoder_config"], saved["student"], saved["view"])


EXPORTS = {"table": "videomae", "rope": "vjepa2"}  # what an encoder's positions are those of


def export_transformers(encoder, folder):
    """Write an encoder as a folder for load_encoder and for `transformers`: of VideoMAE where its
    positions are a table, of V-JEPA 2 where they are rotary.

    AutoModel.from_pretrained(folder) is the encoder, and AutoVideoProcessor likewise what it does
    to the pixels of frames. Frames that other code picks, decodes and resizes give other features
    than those of video.read_clip(video, encoder.view).
    """
    kind = encoder.config.positions
    if kind not in EXPORTS:
        raise InputError(
            f"this encoder's positions are {kind}: transformers' VideoMAE has a table of token"
            " numbers and its V-JEPA 2 rotary ones, so it is neither; export.py --to safetensors"
            " writes it for load_encoder"
        )
    write_folder(encoder, folder, EXPORTS[kind])


def write_folder(encoder, folder, kind):
    """Write an encoder as a folder of one of FORMATS."""
    folder = Path(folder)
    held = [
        name
        for name in ("config.json", "model.safetensors", "pytorch_model.bin")
        if (folder / name).exists()
    ]
    if held or folder.is_file():
        raise InputError(
            f"{folder} {f'holds a {held[0]}' if held else 'is a file'}; export the encoder into a"
            " new folder"
        )
    weights, view = encoder.state_dict(), encoder.view.to_dict()
    FORMATS[kind].write_folder(encoder.config, weights, folder, view)


def load_salt(path, device="cpu", ema=False):
    """(Salt in eval mode, Space, content) of a checkpoint, or with ema of its moving average."""
    saved = load_checkpoint(path, ema)
    shape = saved["predictor_config"]
    make = functools.partial(Predictor, **shape)
    predictor = restored(path, saved["predictor"], shape.get("depth", 12), make)
    salt = Salt(student_of(saved, path), predictor)
    grid = salt.student.config.grid
    if tuple(shape.get("grid") or grid) != tuple(grid):
        raise InputError(f"{path}: the predictor's grid is {shape['grid']}, the student's {grid}")
    return salt.to(device).eval(), from_file(path, Space, **saved["space"]).to(device), saved
