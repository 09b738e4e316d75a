"""Files and folders for results: there whole, or not at all."""

import contextlib
import hashlib
import os
from pathlib import Path

from salt.errors import InputError


def sha256(path):
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 16))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_whole(path, content):
    """Write bytes beside `path`, flush them to the disk, and rename: the file is there whole or not
    at all.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def prepare_folder(folder, flag):
    """Make a folder for results, before the work that ends in it.

    Raises InputError where that cannot be, or it cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another {flag}"
        ) from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} cannot be written to; choose another {flag}")


def prepare_file(path, flag="--out", endings=()):
    """The same for the file of a flag, where one is asked for; endings: of which it has one."""
    if path and os.path.isdir(path):
        raise InputError(f"{flag} {path} is a folder; name a file")
    if path and endings and not path.endswith(endings):
        raise InputError(f"{flag} {path}: name a file that ends in {' or '.join(endings)}")
    if path:
        prepare_folder(os.path.dirname(os.path.abspath(path)), flag)
