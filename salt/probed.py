"""What a probe works on: frozen encoders with their controls, the videos that they are asked about,
and the table of what they know.
"""

import itertools
import os
import resource

import numpy as np
import torch
from tqdm import tqdm

import model
from salt import encoders, features, heldout, lerobot, teachers, verdict
from salt.cache_format import fingerprint
from salt.checkpoint import load_checkpoint
from salt.errors import InputError, VideoError
from salt.files import sha256
from salt.loader import prefetch
from salt.masks import permute
from salt.ops import patchify
from salt.score import show_interval
from salt.splits import load_split, overlap
from salt.video import read_row
from salt.views import View


class Encoders:
    """The .sources of a probe, the students of checkpoints first, and what these were trained on.

    s      a probe's settings: ema, untrained_seeds, teacher, pixels, dtype
    paths  of checkpoints, which must cut their clips alike
    Untrained encoders are of the first one's shape; their Sources are called 'untrained 0', ...
    """

    def __init__(self, s, paths, device, log):
        self.sources = []
        self.seen, self.says_all = [], True  # heldout.trained_on of each checkpoint that says it
        self.view, self.shape = None, None
        for path in paths:
            saved = load_checkpoint(path, s.ema)
            view = View.from_dict(saved["view"])
            self.view = self.view or view
            difference = self.view.difference(view)
            if difference:
                raise InputError(
                    f"{path} was trained under another view than {paths[0]}: {difference}; probe"
                    " them apart"
                )
            student = encoders.student_of(saved, path)
            self.shape = self.shape or student.config
            name = "student" if len(paths) == 1 else short_name(path, paths)
            self.add(name, student, s, device)
            averaged = ", the moving average of its weights" * s.ema
            log(f"probing {path}, step {saved['step']}{averaged}: {name}")
            self.note_training(name, saved.get("trained_on"), s.val_split, log)
        self.students = [source.name for source in self.sources]
        for number in range(s.untrained_seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1000 + number)
                encoder = model.Encoder(self.shape)
            self.add(f"untrained {number}", encoder, s, device)
        if s.teacher:
            self.add_teacher(s, device)
        if s.pixels:
            self.sources += features.pixel_sources(self.view.frames)

    def note_training(self, name, seen, split, log):
        """Which videos it was trained on, as far as its checkpoint says it."""
        if seen:
            self.seen.append(seen)
        self.says_all = self.says_all and bool(seen)
        if not seen:
            log(
                f"whether the {name} was trained on videos of the split {split!r} is unknown: the"
                " checkpoint is of an older version"
            )
        elif seen["clips"] is None:
            log(
                f"whether the {name} was trained on copies of videos of the split {split!r}, under"
                " other ids, is unknown: its training decoded them and kept no fingerprints"
            )

    def count_known(self, known):
        """How many Rows are among the training videos, or None where a checkpoint does not say."""
        return len(known) if self.says_all else None

    def add(self, name, encoder, s, device):
        encoder = encoder.to(device).eval()
        model.cast_matrices(encoder, s.dtype)
        self.sources.append(features.encoder_source(name, encoder))

    def add_teacher(self, s, device):
        view = self.view
        asked = teachers.Asked(view.frames, view.size)
        teacher = teachers.load_teacher(s.teacher, device, s.dtype, asked)
        c = teacher.config
        if (c.frames, c.size) != (view.frames, view.size):
            raise InputError(
                f"the teacher {s.teacher} takes {c.frames} frames of {c.size} pixels, and the"
                f" checkpoint {view.frames} of {view.size}; leave --teacher out"
            )
        self.sources.append(features.encoder_source("teacher", teacher))

    def know(self, row, clip):
        """Whether one of the checkpoints was trained on this video, or on the pixels of its clip
        uint8 [T, H, W, 3] under the training view.
        """
        patches = np.ascontiguousarray(patchify(clip, self.shape.patch, self.shape.tubelet))
        ids = heldout.hash_ids([f"{row.id}\t\n".encode()])
        marks = np.array([fingerprint(patches)])
        return any(
            heldout.among(ids, seen["ids"]).any() or heldout.among(marks, seen["clips"]).any()
            for seen in self.seen
        )


def short_name(path, paths):
    """The folder of a checkpoint, with the file where two are of one folder."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(each))) for each in paths]
    own = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return own if folders.count(own) == 1 else f"{own}/{os.path.basename(path)}"


class Asked:
    """The videos of a probe: those its heads are fitted on, and held-out ones.

    s         a probe's settings: data, train_split, val_split, splits_dir, seed, threads,
              batch_size
    """

    def __init__(self, s, log):
        self.s = s
        self.log = log
        self.rows = {
            split: load_split(s.data, split, s.splits_dir, log, lerobot.asked(s))
            for split in (s.train_split, s.val_split)
        }
        both = {row.id for row in self.rows[s.train_split]}
        both &= {row.id for row in self.rows[s.val_split]}
        if both:
            raise InputError(
                f"{len(both)} videos, {min(both)} among them, are in both --train_split"
                f" {s.train_split} and --val_split {s.val_split}; a probe is tested on videos it"
                " was not fitted on"
            )
        self.marks = {s.train_split: {}, s.val_split: {}}  # SHA-256 of a file -> its Rows
        self.known = []  # held-out Rows that an encoder was trained on
        self.failures = []

    def drawn(self, split, count, usable=lambda row: True):
        """Up to `count` Rows of a split, drawn by the seed; no more are asked whether they are
        usable.
        """
        rows = self.rows[split]
        order = (rows[i] for i in permute(np.arange(len(rows)), len(rows), self.s.seed, 0))
        return list(itertools.islice(filter(usable, order), count))

    def clips_of(self, row, split, views, encoders):
        """[clip a view] of a video, or the VideoError that it gives: also where a held-out video's
        file is that of a training video.
        """
        held_out = split != self.s.train_split
        try:
            clips = read_row(row, [*views, *[encoders.view] * held_out])
            mark = sha256(row.path)
        except VideoError as error:
            return error
        if held_out:
            twins = self.marks[self.s.train_split].get(mark, ())
            same = next((other for other in twins if overlap(row, other)), None)
            if same:
                return VideoError(
                    f"{row.id!r} is the training video {same.id!r} under another name, or shares"
                    " frames with it"
                )
            if encoders.know(row, clips.pop()):
                self.known.append(row)
        self.marks[split].setdefault(mark, []).append(row)
        return clips

    def fill(self, features, encoders, split, rows, views_of, arranged=list):
        """Add clips to Features: [(Row, their numbers int64 [clips])] of the videos that are good.

        rows      of a split, the training split before the other
        views_of  (Row) -> [View]: a clip each
        arranged  (clips) -> what of them is kept
        """
        waiting, made = [], []

        def add_waiting():
            if waiting:
                numbers = features.add(np.concatenate([clips for _, clips in waiting]))
                ends = np.cumsum([len(clips) for _, clips in waiting])
                parts = np.split(numbers, ends[:-1])
                made.extend((row, part) for (row, _), part in zip(waiting, parts))
                waiting.clear()

        jobs = prefetch(
            lambda row: self.clips_of(row, split, views_of(row), encoders),
            rows,
            self.s.threads,
            2 * self.s.batch_size,
        )
        bar = tqdm(jobs, total=len(rows), desc=split, unit="video", dynamic_ncols=True)
        for row, clips in zip(rows, bar):
            if isinstance(clips, VideoError):
                self.failures.append(str(clips))
                self.log(f"skipped: {clips}")
                continue
            waiting.append((row, np.stack(arranged(clips))))
            if sum(len(clips) for _, clips in waiting) >= self.s.batch_size:
                add_waiting()
        add_waiting()
        if not made:
            reason = self.failures[0] if self.failures else "there is none"
            raise InputError(f"no video of the split {split!r} could be had; the first: {reason}")
        return made

    def say_what_is_odd(self):
        """Held-out videos that are known to the encoders, or copies of each other."""
        if self.known:
            self.log(
                f"{len(self.known)} of the held-out videos are of those that the encoder was"
                " trained on: held out from the probe's fit, not from the encoder's"
            )
        copies = sum(
            any(overlap(row, other) for other in rows[:i])
            for rows in self.marks[self.s.val_split].values()
            for i, row in enumerate(rows)
        )
        if copies:
            self.log(
                f"{copies} held-out videos are copies of others, under other names: the intervals"
                " count them as videos of their own, and are too narrow"
            )


class Table:
    """Scores by source and column, side by side; untrained encoders of several seeds as their mean.

    scores  {source: {column: Score}}
    """

    def __init__(self, scores, students, unit):
        self.unit = unit  # "accuracy" or "R2"
        self.students = students
        untrained = [name for name in scores if name.startswith("untrained ")]
        self.seeds = {name: scores[name] for name in untrained}
        self.rows = {name: row for name, row in scores.items() if name not in untrained}
        if untrained:
            self.rows[f"untrained, mean of {len(untrained)}"] = {
                column: verdict.mean_score([scores[name][column] for name in untrained])
                for column in scores[untrained[0]]
            }
        self.columns = list(dict.fromkeys(c for row in self.rows.values() for c in row))

    def lines(self):
        """The table, a line a source, and a sentence a student, control and column."""
        width = max(map(len, self.rows)) + 2
        yield f"{self.unit:{width}}" + "".join(f"{column:>26}" for column in self.columns)
        for name, row in self.rows.items():
            cells = []
            for column in self.columns:
                score = row.get(column)
                ends = "" if score is None else show_interval(score.interval())
                cells.append("-" if score is None else f"{score.value:.3f} {ends}")
            yield f"{name:{width}}" + "".join(f"{cell:>26}" for cell in cells)
        for student in self.students:
            for other in self.rows:
                for column in self.columns if other != student else ():
                    if column in self.rows[other] and column in self.rows[student]:
                        scores = self.rows[student][column], self.rows[other][column]
                        yield f"{column}: {verdict.verdict(student, scores[0], other, scores[1])}"

    def figure(self, column):
        """{'accuracy', 'ci95', 'untrained', 'pixels', 'difference_ci95'} of the first student."""
        student = self.rows[self.students[0]][column]
        found = {self.unit: student.value, "ci95": student.interval()}
        untrained = [row for name, row in self.rows.items() if name.startswith("untrained")]
        if untrained:
            found["untrained"] = {
                self.unit: untrained[0][column].value,
                "ci95": untrained[0][column].interval(),
                "seeds": [row[column].value for row in self.seeds.values()],
            }
            found["difference_ci95"] = student.minus(untrained[0][column])[1]
        if "pixels 7x7" in self.rows:
            score = self.rows["pixels 7x7"]["grid"]
            found["pixels"] = {self.unit: score.value, "ci95": score.interval()}
        return found

    def to_dict(self):
        """The same for a JSON file."""
        found = {}
        for name, row in (self.rows | self.seeds).items():
            found[name] = {}
            for column, score in row.items():
                found[name][column] = {self.unit: score.value, "ci95": score.interval()}
                others = self.students if name not in self.students else ()
                for student in (other for other in others if column in self.rows[other]):
                    value, ends = self.rows[student][column].minus(score)
                    found[name][column][f"{student} minus this"] = {"value": value, "ci95": ends}
        return found


def peak_memory(device):
    """A line on the most that was in use."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    gpu = ""
    if device.type == "cuda":
        gpu = f", GPU {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    return f"peak memory {peak:.2f} GB{gpu}"
