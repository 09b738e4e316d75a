"""What tells the videos that a model was trained on from held-out ones: by their ids, and by the
fingerprints of their clips.

Ten million ids are 80 MB of numbers here, never a list of str; a checkpoint carries the numbers, so
that a later evaluation can tell.
"""

import numpy as np
import torch

from salt.errors import InputError

PIECE = 1 << 22  # bytes of ids hashed at a time
FACTOR = 0x9E3779B97F4A7C15


def hash_lines(content):
    """A 64-bit number for each line of bytes up to its tab: the line's bytes as digits of a
    polynomial modulo 2^64, scrambled (splitmix64).

    content: uint8 [bytes] of whole lines that end in a newline -> int64 [lines].
    """
    ends = np.flatnonzero(content == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(content)) - np.repeat(starts, ends + 1 - starts)  # of a byte in its line
    powers = np.cumprod(np.full(place.max(initial=0) + 1, FACTOR, np.uint64))
    in_id = (
        np.cumsum(content == ord("\t")) - np.repeat(np.arange(len(ends)), ends + 1 - starts) == 0
    )
    digits = np.where(in_id, content.astype(np.uint64) + np.uint64(1), np.uint64(0))
    x = np.add.reduceat(digits * powers[place], starts) if len(ends) else np.zeros(0, np.uint64)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (x ^ x >> np.uint64(31)).view(np.int64)


def hash_ids(pieces):
    """int64 [n] of the lines `video id<TAB>anything<NEWLINE>` in an iterable of bytes, however it
    is cut up.
    """
    parts, rest = [], b""
    for piece in pieces:
        lines, newline, rest = (rest + piece).rpartition(b"\n")
        parts.append(hash_lines(np.frombuffer(lines + newline, np.uint8)))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def numbers_of(source):
    """(int64 [n] of the ids, int64 [n] fingerprints or None) of the clips of clips.Videos or
    clips.Records.
    """
    if source.cache is None:
        return hash_ids([b"".join(f"{row.id}\t\n".encode() for row in source.rows)]), None
    with open(source.cache.ids.path, "rb") as file:
        return hash_ids(iter(lambda: file.read(PIECE), b"")), source.cache.fingerprints


def trained_on(source):
    """{'ids', 'clips'}: sorted int64 tensors of the training clips, for a checkpoint; clips is None
    where there are no fingerprints.
    """
    ids, clips = numbers_of(source)
    return {
        "ids": torch.from_numpy(np.unique(ids)),
        "clips": None if clips is None else torch.from_numpy(np.unique(clips)),
    }


def among(numbers, known):
    """bool [n]: which of int64 `numbers` are in the sorted int64 tensor `known`."""
    if numbers is None or known is None or not len(known):
        return np.zeros(0 if numbers is None else len(numbers), bool)
    known = known.numpy()
    return known[np.searchsorted(known, numbers).clip(max=len(known) - 1)] == numbers


def records_to_measure(source, seen, what, allowed):
    """(int64 records of `source` that a model may be measured on, 'held-out' or 'training', a line
    for the log or None).

    source   clips.Videos or clips.Records
    seen     trained_on() of the model; None: of a checkpoint that does not say
    what     how to name the source in a message
    allowed  whether training videos may be among them, which are then called so
    A clip whose pixels are those of a training clip under another id is left out. Raises InputError
    where training videos are among them and that is not allowed, or nothing is left.
    """
    kept, kind, line = np.arange(len(source)), "held-out", None
    if seen is None:
        line = (
            f"whether videos of {what} were trained on is unknown: the checkpoint is of an older"
            " version"
        )
        return kept, kind, line
    ids, clips = numbers_of(source)
    known = among(ids, seen["ids"])
    # a video's other views are cut by its id, so their pixels differ
    twins = np.isin(ids, ids[among(clips, seen["clips"])]) if clips is not None else known
    if known.any():
        name = source.name(int(np.flatnonzero(known)[0]))[0]
        if not allowed:
            raise InputError(
                f"{what} holds {int(known.sum())} of {len(source)} clips of videos that were"
                f" trained on, {name!r} among them; R2 on those says nothing of new videos. Give"
                " held-out ones, or --training_videos, and the figures are called training R2"
            )
        kind = "training"
        line = (
            f"{what}: {int(known.sum())} of {len(source)} clips are of training videos: what"
            " follows is training R2"
        )
    elif seen["clips"] is None:
        line = (
            f"{what}: no id was trained on; copies under other ids cannot be told, since training"
            " decoded its clips and kept no fingerprints"
        )
    elif twins.any():  # where clips are decoded, eval_distill.py compares them as they come
        names = ", ".join(repr(source.name(int(i))[0]) for i in np.flatnonzero(twins)[:3])
        if twins.all():
            raise InputError(
                f"{what}: every clip is a training clip under another id ({names}, ...); give"
                " held-out videos"
            )
        kept = kept[~twins]
        line = (
            f"{what}: {int(twins.sum())} clips are training clips under other ids ({names}):"
            " left out"
        )
    return kept, kind, line


def copies(ids, clips, name):
    """A line on clips that have the pixels of another id's, or None.

    ids, clips: int64 [n], a number of each id, and fingerprints or None; name(i): the id of clip i.
    """
    if clips is None:
        return None
    order = np.argsort(clips, kind="stable")
    same = (np.diff(clips[order]) == 0) & (np.diff(ids[order]) != 0)
    if not same.any():
        return None
    at = int(np.flatnonzero(same)[0])
    first, second = (repr(name(int(order[i]))) for i in (at, at + 1))
    return (
        f"{int(same.sum())} clips have the pixels of another video's ({second} those of {first}): "
        "intervals count copies as videos of their own, and are too narrow"
    )


def checked(errors, batch, source):
    """errors, of score.clip_errors.

    Raises InputError, naming a clip, where its targets are not finite: no R2 can be had with it.
    """
    for rows in errors.values():
        broken = np.flatnonzero(~np.isfinite(rows["spread"]))
        if len(broken):
            name = source.name(int(batch.records[int(broken[0])]))[0]
            raise InputError(
                f"the targets of {len(broken)} held-out clips in a batch, of {name!r} among them,"
                " are not finite: their latents are damaged, or the teacher's are; check the cache"
                " with cache_latents.py --verify, or the teacher"
            )
    return errors
