"""What a run works on: clips, view, teacher and targets opened together, or refused in one line."""

import functools
import hashlib
import os
from typing import NamedTuple

import numpy as np

import model
from salt import config, heldout, lerobot, ranks, teachers
from salt.cache import open_cache
from salt.cache_format import agree_on, content_digest
from salt.clips import Records, Videos
from salt.errors import InputError
from salt.masks import check_batch
from salt.odd_videos import odd_videos
from salt.refusals import refuse_optimisation
from salt.splits import load_split
from salt.views import IMAGENET_MEAN, IMAGENET_STD, View


class Task(NamedTuple):
    """What train.py works on, of which nothing is to be refused any more."""

    clips: Videos | Records  # to train on
    teacher: model.Encoder | None  # the one that runs on the fly
    held_out: Records | None  # clips of --val_cache,
    measured: np.ndarray | None  # int64: which of them R2 is measured on,
    measured_on: str  # and what that makes of it: "held-out" or "training"
    encoder: model.EncoderConfig  # of the student
    predictor: dict  # what model.Predictor takes
    trained_on: dict  # heldout.trained_on of the clips
    identity: dict  # what a resumed run must have in common with this one
    stats: dict | None  # Cache.stats of the latents to predict, where they are cached

    def with_latents(self, batch):
        """A batch with the latents of the teacher that runs on the fly, as caching makes them."""
        if not self.teacher:
            return batch
        return batch._replace(latents=teachers.teacher_latents(self.teacher, batch.patches))

    def hashes(self, pixels):
        """{what: 12 hex digits} of the content of the paths, so that runs can be told apart that
        were made from other content under one path; of what counts for pixels alone.
        """
        counts = ("view_hash", "ids_sha256", "clips_sha256", "list", "files")
        found = {}
        for key, what in NAMES_OF_PARTS.items():
            parts = self.identity[key] or {}
            parts = {name: parts[name] for name in parts if not pixels or name in counts}
            if parts:
                found[what] = content_digest(parts)[:12]
        return found


NAMES_OF_PARTS = {"train": "training clips", "held_out": "held-out clips", "teacher": "latents of"}


def open_training(s, device, log):
    """The Task of train.py's settings. Raises InputError on what does not go together."""
    odd_videos.watch(s.longest_seconds, log.from_any)
    if "test" in s.split.split("+"):
        raise InputError(
            "--split test: the test split has no labels and is not for training; use train"
        )
    teacher = None
    if s.cache:
        clips = clips_of_cache(s, log)
    elif not s.data:
        raise InputError(
            "give --cache (made by cache_latents.py), or --data with --teacher or with --target"
            " pixels; see --help"
        )
    else:
        if s.teacher and s.target == "latents":
            teacher = teachers.on_the_fly(s.teacher, device, s.frames, s.resolution)
        clips = clips_of_videos(s, teacher, log)
    shape = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    dim = teacher_identity = None
    if clips.cache and clips.cache.has_latents:
        if s.teacher and s.target == "latents":
            raise InputError(
                f"{s.cache} holds the latents of its teacher; leave --teacher out, or give a cache"
                " without latents"
            )
        shape = {"mean": clips.cache.mean, "std": clips.cache.std}
        dim, teacher_identity = clips.cache.latent_shape[1], clips.cache.teacher_identity
    elif s.target == "latents":
        teacher = teacher_of(s, clips, teacher, device, log)
        shape = {"mean": teacher.config.mean, "std": teacher.config.std}
        dim, teacher_identity = teacher.config.dim, teacher.identity
    held_out = held_out_clips(s, clips, teacher_identity, log)
    refuse_optimisation(s)
    check_batch(len(clips), s.batch_size)
    seen = ranks.from_rank_0(functools.partial(heldout.trained_on, clips))
    measured, measured_on = None, "held-out"
    if held_out:
        measured, measured_on = measured_records(s, held_out, seen, log)

    view = clips.view
    shape |= {"frames": view.frames, "size": view.size}
    shape |= {"patch": clips.patch, "tubelet": clips.tubelet}
    shape |= {"positions": s.positions} | ({"depth": s.depth} if s.depth else {})
    encoder = model.config_of_size(s.size, **shape)
    predictor = {
        "dim_in": encoder.dim,
        "dim_out": encoder.patch_dim if s.target == "pixels" else dim,
        "tokens": encoder.tokens,
        "families": s.masks,
        "dim": s.predictor_dim,
        "depth": s.predictor_depth,
        "heads": s.predictor_heads,
        "attends": s.predictor_attention,
        "seen": s.context_loss > 0,
        "positions": s.positions,
        "grid": encoder.grid,
    }
    identity = {
        "train": clips.cache.identity if clips.cache else identity_of_list(clips.rows),
        "teacher": teacher_identity,
        "held_out": held_out.cache.identity if held_out else None,
    }
    stats = clips.cache.stats if clips.cache and s.target == "latents" else None
    return Task(
        clips=clips,
        teacher=teacher,
        held_out=held_out,
        measured=measured,
        measured_on=measured_on,
        encoder=encoder,
        predictor=predictor,
        trained_on=seen,
        identity=identity,
        stats=stats,
    )


def clips_of_cache(s, log):
    """The Records of --cache, whose view and list no flag may contradict."""
    cache = open_cache(s.cache)
    if "test" in cache.metadata["split"].split("+"):
        raise InputError(
            f"{s.cache} was made from the test split, which is not for training; use one of the"
            " train split"
        )
    for name, asked, theirs in (
        ("frames", s.frames, cache.view.frames),
        ("resolution", s.resolution, cache.view.size),
        ("patch", s.patch, cache.patch),
        ("split", s.split if "split" in config.given else None, cache.metadata["split"]),
    ):
        if asked not in (None, theirs):
            raise InputError(
                f"--{name} is {asked}, but the clips of {s.cache} have {name} {theirs}; leave the"
                " flag out, or make another cache"
            )
    return records_of(cache, s, log)


def records_of(cache, s, log):
    """The Records of an open cache, with the rows of its list where it holds no clips."""
    rows = None
    if s.data and not cache.has_patches:
        rows = load_split(s.data, cache.metadata["split"], s.splits_dir, log, lerobot.asked(s))
    return Records(cache, rows)


def clips_of_videos(s, teacher, log):
    """The Videos of --data that are there, cut as the teacher's own are, where there is one."""
    shape = teacher.config if teacher else model.config_of_size(s.size)
    pixels = s.resolution or shape.size
    view = View(s.frames or shape.frames, pixels, pixels)
    if teacher:
        view = view.cut_as(teacher.view)
    rows = load_split(s.data, s.split, s.splits_dir, log, lerobot.asked(s))
    absent = sum(row.path is None for row in rows)
    if absent:
        log(f"{absent} of the {len(rows)} listed videos are not in {s.data} and are left out")
    rows = [row for row in rows if row.path]
    return Videos(rows, view, s.patch or shape.patch, shape.tubelet)


def teacher_of(s, clips, teacher, device, log):
    """The teacher that runs on the fly, which takes these clips."""
    if not s.teacher:
        raise InputError(
            "there are no cached latents to predict: give a --cache that has them, or --teacher, or"
            " train on pixels with --target pixels"
        )
    view = clips.view
    teacher = teacher or teachers.on_the_fly(s.teacher, device, view.frames, view.size)
    shape = teacher.config
    has = view.frames, view.size, clips.patch, clips.tubelet
    if (shape.frames, shape.size, shape.patch, shape.tubelet) != has:
        raise InputError(
            f"the teacher {s.teacher} takes {shape.frames} frames of {shape.size} pixels in patches"
            f" of {shape.patch} and {shape.tubelet} frames, the clips have {has[0]}, {has[1]},"
            f" {has[2]} and {has[3]}; set --frames, --resolution and --patch"
        )
    line = teacher.other_view(view)
    if line:
        log(line)
    for line in teachers.notes(teacher, s.teacher):
        log(line)
    log(f"teacher {s.teacher}: {teacher.takes(view)}")
    return teacher


def held_out_clips(s, clips, teacher_identity, log):
    """The Records of --val_cache, under the same view and teacher; None where there is none."""
    if not s.val_cache:
        return None
    cache = open_cache(s.val_cache)
    difference = clips.view.difference(cache.view)
    if (cache.patch, cache.tubelet) != (clips.patch, clips.tubelet):
        difference = difference or (
            f"patch and tubelet are {clips.patch} and {clips.tubelet} here, {cache.patch} and"
            f" {cache.tubelet} there"
        )
    if difference:
        raise InputError(
            f"--val_cache {s.val_cache} has another view than the training clips: {difference}"
        )
    if s.target == "latents" and not (
        cache.has_latents and agree_on(teacher_identity, cache.teacher_identity)
    ):
        raise InputError(
            f"--val_cache {s.val_cache} holds latents of another teacher than the training cache"
            " (weights, shape, compute or normalisation), or none"
        )
    return records_of(cache, s, log)


def measured_records(s, held_out, seen, log):
    """(records that R2 is measured on, "held-out" or "training"), with what is odd about them."""
    measured, measured_on, said = heldout.records_to_measure(
        held_out, seen, f"--val_cache {s.val_cache}", s.training_videos
    )
    copies = heldout.copies(*heldout.numbers_of(held_out), lambda i: held_out.name(i)[0])
    for line in (said, copies):
        if line:
            log(line)
    return measured, measured_on


def identity_of_list(rows):
    """The same of a list of videos as Cache.identity, as far as it can be told without decoding."""

    def digest(lines):
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    sizes = (f"{row.id}\t{row.start}\t{row.end}\t{os.path.getsize(row.path)}" for row in rows)
    return {"list": digest(row.id for row in rows), "files": digest(sizes)}


def open_held_out(s, table, device, log):
    """(clips, teacher or None) that eval_distill.py measures a comparison.Table on.

    Raises InputError where they are not those that its checkpoints were trained for.
    """
    first, shape = table.first_path, table.first["encoder_config"]
    if s.cache:
        cache = open_cache(s.cache)
        difference = table.view.difference(cache.view)
        if difference:
            raise InputError(
                f"{s.cache} has another view than {first}: {difference}; make a cache of the"
                " held-out split under the view of the training cache"
            )
        if table.predicts_latents and not (
            cache.has_latents and agree_on(table.teacher, cache.teacher_identity)
        ):
            raise InputError(
                f"{s.cache} holds latents of another teacher than {first} was trained on (weights,"
                " shape, compute or normalisation), or none"
            )
        return records_of(cache, s, log), None
    rows = load_split(s.data, s.split, s.splits_dir, log, lerobot.asked(s))
    clips = Videos(rows, table.view, shape["patch"], shape["tubelet"])
    if not table.predicts_latents:
        return clips, None
    if not s.teacher:
        raise InputError("without --cache the targets come from the teacher: give --teacher")
    return clips, teachers.known_teacher(s.teacher, table.teacher, first, device)
