"""Torch files, read without running what is in them."""

import argparse
import math
import os
import pickle
import re
import struct
import warnings
import zipfile

import torch

from salt.errors import InputError

DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    struct.error,
    # all that a damaged file has been seen to raise
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def load_pickle(path):
    """A torch file as tensors and plain types; code in it is refused."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                stated = sum(info.file_size for info in archive.infolist())
                size = os.path.getsize(path)
                if stated > size:  # torch packs nothing; this may unpack to more than memory
                    raise InputError(
                        f"{path} has {size} bytes and states {stated} of content; it "
                        "is no file of weights as torch writes them"
                    )
                broken = archive.testzip()
                if broken:
                    raise InputError(
                        f"{path} is damaged: the checksum of {broken} is wrong; use another copy"
                    )
        # VideoMAE files hold their arguments as one
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # of odd pickle protocols: what cannot be loaded is an error below
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported operand) (\S+)", str(error))
        raise InputError(
            f"{path} is no file of plain weights{f' (it asks for {found[1]})' if found else ''} and"
            " was not loaded, since it could run code"
        ) from None
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path} cannot be read as a torch file:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds {type(saved).__name__}, not a dictionary of weights")
    return saved


def step_and_run(path):
    """(step, name of its run or None) of a checkpoint, from its small parts alone, unchecked;
    infinity for a file that cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["step"]), content.get("run")
    except DAMAGE:
        return math.inf, None


def whole(state, path):
    """The tensors of {name: tensor or other}.

    Raises InputError where one states more numbers than the file holds for it: a copy of it would
    take memory that no check of the file's size has seen.
    """
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in found.items():
        if tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is of layout {tensor.layout}; weights are plain")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: {name} states {list(tensor.shape)}, more than is there")
    return found


def from_file(path, make, *arguments, **fields):
    """make(...) of what a file says, with anything that does not fit as one line that names the
    file.
    """
    try:
        return make(*arguments, **fields)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if isinstance(error, InputError) and str(path) in str(error):
            raise
        raise InputError(f"{path} is malformed: {error}") from None


def restored(path, state, depth, make):
    """make(), an Encoder or Predictor, with the weights `state` of the file `path`, in float32.

    No weight takes memory before names and shapes are known to fit, whatever a configuration says.
    """
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if depth > blocks:
        raise InputError(f"{path} holds {blocks} blocks, and its configuration says {depth}")
    with torch.device("meta"):
        module = from_file(path, make)
    state = {name: tensor.float() for name, tensor in whole(state, path).items()}
    load_weights(module, state, path, assign=True)
    return module


def load_weights(module, state, path, assign=False):
    """load_state_dict, with what does not fit in one line; assign: without copies."""
    expected = module.state_dict()
    for name in expected:
        if name not in state:
            raise InputError(f"{path} lacks the weight {name}")
        if state[name].shape != expected[name].shape:
            raise InputError(
                f"{path}: {name} has shape {list(state[name].shape)}, expected"
                f" {list(expected[name].shape)}"
            )
    module.load_state_dict({name: state[name] for name in expected}, assign=assign)
