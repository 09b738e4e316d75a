"""What the stages share, one job a file; and, from anywhere, what a policy takes:

from salt import StreamingEncoder, load_encoder
"""

import contextlib
import hashlib
import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FROM = {
    "load_encoder": "salt.encoders",
    "export_transformers": "salt.encoders",
    "StreamingEncoder": "salt.stream",
}


def __getattr__(name):
    """What others import from here, found when it is asked for, since it imports torch."""
    if name not in FROM:
        raise AttributeError(f"module 'salt' has no attribute {name!r}")
    with our_model():
        return getattr(importlib.import_module(FROM[name]), name)


@contextlib.contextmanager
def our_model():
    """`import model` finds the file of this project, in whatever folder Python runs and whatever
    is called model there.
    """
    path, before = os.path.join(ROOT, "model.py"), sys.modules.get("model")
    known = before or importlib.util.find_spec("model")
    if os.path.realpath(getattr(known, "__file__", None) or known.origin or "") == path:
        yield
        return
    spec = importlib.util.spec_from_file_location("model", path)
    sys.modules["model"] = ours = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(ours)
        yield
    finally:
        del sys.modules["model"]
        if before is not None:
            sys.modules["model"] = before


def source_digest():
    """SHA-256 of the files in csrc/, by which an extension that was built from others is known;
    None where they are not there.
    """
    digest, folder = hashlib.sha256(), os.path.join(ROOT, "csrc")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(f"{name}\n".encode() + file.read())
    return digest.hexdigest() if os.path.isdir(folder) else None
