"""What the stages share, one job a file."""

import hashlib
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def source_digest():
    """SHA-256 of the files in csrc/, by which an extension that was built from others is known;
    None where they are not there.
    """
    digest, folder = hashlib.sha256(), os.path.join(ROOT, "csrc")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(f"{name}\n".encode() + file.read())
    return digest.hexdigest() if os.path.isdir(folder) else None
