"""Paths that flags name and that are not there: said at once, with what to do."""

import importlib.util
import os
import re

from salt.errors import InputError, nearest

NOT_THERE = {  # what to say of a path that a flag names and that is not there
    "data": (
        "there is no data folder {}; --data names the folder that holds the videos and their lists"
    ),
    "cache": "{} is no cache: there is no such folder; make one with cache_latents.py --out {}",
    "teacher": (
        "there is no teacher at {}; --teacher names a folder in transformers format (config.json,"
        " model.safetensors), a VideoMAE .pth, a V-JEPA 2 .pt, a checkpoint of train.py, or"
        " file.py:function"
    ),
    "hub": (
        "there is no teacher at {}; if that is a model of the Hugging Face hub: `hf download {}"
        " --local-dir {local}`, then --teacher {local}"
    ),
}


def in_a_file(teacher):
    """(file, function) of a --teacher `file.py:function`, empty where it has another form."""
    found = re.fullmatch(r"(.*\.py):?(\w*)", str(teacher))
    return (found[1], found[2]) if found else ("", "")


HUB = r"[\w.-]+/[\w.-]+"  # owner/name


def of_the_hub(path):
    """Whether a path that is not there can be a model's name on the Hugging Face hub."""
    return (
        re.fullmatch(HUB, str(path))
        and not os.path.exists(path)
        and not os.path.isdir(os.path.dirname(path))
    )


def check(**flags):
    """Raises InputError where a path that is given is not there: at once, and not after torch was
    imported, which takes ten seconds.

    flags: {name of a setting: its value, a path, a list of paths or None}. Names that end in _cache
    are caches.
    """
    for name, value in flags.items():
        for path in [value] if isinstance(value, str) else value or ():
            if name == "teacher":
                path = in_a_file(path)[0] or path
            if not path or os.path.exists(os.path.expanduser(path)):
                continue
            kind = "cache" if name not in NOT_THERE else name
            if kind == "teacher" and re.fullmatch(HUB, path):
                if of_the_hub(path) and importlib.util.find_spec("huggingface_hub"):
                    continue  # hub.py fetches it
                kind = "hub"
            above = os.path.dirname(os.path.abspath(path))
            beside = nearest(
                os.path.basename(path), os.listdir(above) if os.path.isdir(above) else ()
            )
            raise InputError(
                NOT_THERE[kind].format(path, path, local=os.path.basename(path)) + beside
            )
