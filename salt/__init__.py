"""What the stages share, one job a file; and, from anywhere, what a policy takes:

from salt import StreamingEncoder, load_encoder
"""

import hashlib
import importlib
import os

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
    return getattr(importlib.import_module(FROM[name]), name)


def source_digest():
    """SHA-256 of the files in csrc/, by which an extension that was built from others is known;
    None where they are not there.
    """
    digest, folder = hashlib.sha256(), os.path.join(ROOT, "csrc")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(f"{name}\n".encode() + file.read())
    return digest.hexdigest() if os.path.isdir(folder) else None
