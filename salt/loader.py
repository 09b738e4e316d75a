"""Batches: clips, masks and latents, prepared by threads. No processes: no shared memory."""

import enum
import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from salt.errors import InputError, VideoError
from salt.masks import Masks, sample_masks
from salt.views import sample_id


def prefetch(work, jobs, threads, ahead):
    """work(job) of each job, in order, computed on `threads` threads at most `ahead` jobs early.

    Threads only: no shared memory.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(work, job))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Rows(enum.Flag):
    """Which rows of a batch's patches or latents the caller will look at, of all mask families."""

    NONE = 0
    CONTEXT = 1
    TARGET = 2
    ALL = 4  # those in no mask, too

    def wanted(self, masks, shape):
        """bool [B, N] of these rows, which several masks may ask for; None for all of them."""
        if self == ALL or not masks:
            return None
        wanted = torch.zeros(shape, dtype=torch.bool)
        for drawn in masks:
            if CONTEXT in self:
                wanted.scatter_(1, drawn.context, True)
            if TARGET in self:
                wanted.scatter_(1, drawn.target, True)
        return wanted


NONE = Rows.NONE
CONTEXT = Rows.CONTEXT
TARGET = Rows.TARGET
ALL = Rows.ALL


def rows_to_read(target, teacher=None, context=False):
    """{'patches': Rows, 'latents': Rows} that a step looks at, for a Loader.

    target      'latents' or 'pixels'
    teacher     one that runs on the fly, which needs every patch, or None
    context     the context's latents, too: for a loss there, or as a guess at the others
    """
    if target == "pixels":
        return {"patches": CONTEXT | TARGET, "latents": NONE}
    latents = CONTEXT | TARGET if context else TARGET
    return {"patches": ALL if teacher else CONTEXT, "latents": latents}


class Batch(NamedTuple):
    """Clips of a step, or of a part of it."""

    ids: torch.Tensor  # int64 [B], sample ids
    patches: torch.Tensor | None  # uint8 [B, N, P]
    latents: torch.Tensor | None  # float16 [B, N, D]
    masks: list  # Masks of these clips, one a family
    records: np.ndarray | None = None  # int64 [B], which of the source's records these are

    def part(self, few):
        """The Batch of the clips at a slice `few`."""
        records = None if self.records is None else self.records[few]
        return self.map(lambda x: x[few])._replace(records=records)

    def split(self, count):
        """`count` Batches of equal size, in order."""
        size = len(self.ids) // count
        return [self.part(slice(i * size, (i + 1) * size)) for i in range(count)]

    def to(self, device):
        """The same on a device, copied beside what it does."""

        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, change):
        """The same with each tensor changed: masks and ids first, since out of pageable memory
        these wait for a copy's stream.
        """
        masks = [
            Masks(change(drawn.context), change(drawn.target), drawn.family) for drawn in self.masks
        ]
        ids, patches, latents = (
            x if x is None else change(x) for x in (self.ids, self.patches, self.latents)
        )
        return Batch(ids, patches, latents, masks, self.records)

    def tensors(self):
        masks = (x for drawn in self.masks for x in (drawn.context, drawn.target))
        return [x for x in (self.ids, self.patches, self.latents, *masks) if x is not None]


class Slots:
    """Memory of one batch, used again and again: pinned where it goes on to a GPU, else numpy's,
    which asks for large pages.
    """

    def __init__(self, source, batch_size, reads, pin):
        def make(shape, dtype, numpys):
            return (
                torch.empty(batch_size, *shape, dtype=dtype, pin_memory=True)
                if pin
                else torch.from_numpy(np.empty((batch_size, *shape), numpys))
            )

        self.patches = make(source.patch_shape, torch.uint8, np.uint8)
        self.latents = (
            make(source.latent_shape, torch.float16, np.float16) if "latents" in reads else None
        )
        self.copied = None  # a CUDA event: the copy to the GPU that still reads these


@functools.lru_cache
def copy_stream(device):
    """The stream on which batches go over to a GPU: one for all, since the memory allocator keeps a
    pool for each.
    """
    return torch.cuda.Stream(device)


class Loader:
    """Batches of clips with their masks, prepared by threads while the caller works on the one
    before: an iterator. No processes: no shared memory.

    source       Videos or Records
    sampler      yields (epoch, records) a batch: shuffled() or in_order()
    families     mask families to draw, by `seed`, the batch's epoch and each clip's id
    patches, latents  which rows the caller will look at: NONE, CONTEXT, TARGET, both, or ALL. Other
                 rows hold what an earlier batch left there; a row that several families ask for is
                 read once
    threads      decoding and reading threads
    ahead        batches prepared early; memory for one more is kept
    device       where the batches go; to a GPU on a stream beside the caller's, whole, since PCIe
                 has the room: 116 MB for 24 clips
    share        of the families' targets, see masks.sample_masks
    failed       called with (record, VideoError) in the order of the batches; by default the error
                 is raised
    substitutes  True (training): the place of a video that cannot be decoded goes to the next
                 readable of records i + 1, i + 2, ..., which depends on i alone. False
                 (evaluation): it is left out of its batch

    A batch's tensors are the caller's until it asks for the next. Its content depends on seed,
    epoch and records alone. Raises InputError where TRIES videos in a row fail, and, naming shard
    and row, where a cache cannot be read.
    """

    TRIES = 16

    def __init__(
        self,
        source,
        sampler,
        families=(),
        seed=0,
        patches=ALL,
        latents=ALL,
        threads=4,
        ahead=2,
        device="cpu",
        failed=None,
        substitutes=False,
        share=1.0,
    ):
        self.source = source
        self.families = families
        self.seed = seed
        self.share = share
        self.rows = {"patches": patches, "latents": latents}
        self.threads = threads
        self.ahead = ahead
        self.failed = failed
        self.substitutes, self.device = substitutes, torch.device(device)
        self.side = copy_stream(self.device) if self.device.type == "cuda" else None
        stored = {
            "patches": not source.decodes,
            "latents": source.latent_shape is not None,
        }
        self.reads = [kind for kind in stored if stored[kind] and self.rows[kind] != NONE]
        self.decodes = source.decodes and patches != NONE
        self.pools = [ThreadPoolExecutor(count) for count in (threads, 1, 1)]
        self.stream = self.run(sampler, *self.pools)

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return next(self.stream)
        except BaseException:  # the end, too
            self.close()
            raise

    def close(self):
        """Stop preparing batches, and wait for the threads."""
        self.stream.close()
        for pool in self.pools:
            pool.shutdown()

    def run(self, sampler, decoders, assembler, planner):
        """The batches in order: up to `ahead` of them in the making while the caller has one."""
        free = deque()
        pending = deque()
        try:
            for epoch, records in sampler:
                records = np.asarray(records)
                yield from self.finished(pending, free, self.ahead)
                if not free:
                    pin = self.side is not None
                    free.append(Slots(self.source, len(records), self.reads, pin))
                slots = free.popleft()
                planned = planner.submit(self.plan_ahead, epoch, records) if self.reads else None
                decoding = [
                    decoders.submit(self.decode, slots, place, record)
                    for place, record in enumerate(records.tolist() if self.decodes else ())
                ]
                job = assembler.submit(self.assemble, slots, epoch, records, decoding, planned)
                pending.append((slots, job))
            yield from self.finished(pending, free, 0)
        finally:
            # No waiting here: a Loader that nobody closed is collected wherever that happens to
            # be, in the start of another thread for one, which then waits for itself.
            for pool in (assembler, decoders, planner):
                pool.shutdown(wait=False, cancel_futures=True)

    def finished(self, pending, free, left):
        """The oldest batches, until `left` are in the making; their memory is free once the caller
        asks for the next.
        """
        while len(pending) > left:
            slots, job = pending.popleft()
            batch = self.hand_over(slots, job.result())
            if batch:
                yield batch
            free.append(slots)

    def plan(self, epoch, records):
        """(sample ids, [Masks], {kind: rows to read, bool [B, N], or None for all}) of a batch."""
        ids = torch.tensor([sample_id(*self.source.name(int(record))) for record in records])
        how = {"grid": self.source.grid, "share": self.share}
        masks = [sample_masks(ids, epoch, self.seed, family, **how) for family in self.families]
        shape = len(ids), self.source.patch_shape[0]
        return ids, masks, {kind: self.rows[kind].wanted(masks, shape) for kind in self.reads}

    def plan_ahead(self, epoch, records):
        """The plan, while the disk begins to read."""
        self.source.cache.advise(records, self.reads)
        return self.plan(epoch, records)

    def decode(self, slots, place, i):
        """Fill a place with clip i, or in training with the next readable one: (the record or None,
        the first error or None).
        """
        if slots.copied:
            slots.copied.synchronize()
        first = None
        for step in range(self.TRIES if self.substitutes else 1):
            record = (i + step) % len(self.source) if self.substitutes else i
            try:
                self.source.decode(record, slots.patches[place].numpy())
                return record, first
            except VideoError as error:
                first = first or error
        return None, first

    def assemble(self, slots, epoch, records, decoding, planned):
        """(Batch or None, [(record, error)]) of one batch."""
        if slots.copied:
            slots.copied.synchronize()
        kept, errors = self.decoded(slots, records, decoding) if decoding else (records, [])
        if not len(kept):
            return None, errors
        ids, masks, wanted = self.plan(epoch, kept) if errors or not planned else planned.result()
        for kind in self.reads:
            out = getattr(slots, kind)[: len(ids)]
            self.source.cache.read_rows(kind, kept, out, wanted[kind], self.threads)
        patches = None if self.rows["patches"] == NONE else slots.patches[: len(ids)]
        latents = None if slots.latents is None else slots.latents[: len(ids)]
        batch = Batch(ids, patches, latents, masks, np.asarray(kept, np.int64))
        if self.side:
            with torch.cuda.stream(self.side):
                batch = batch.to(self.device)
                slots.copied = self.side.record_event()
        return batch, errors

    def decoded(self, slots, records, decoding):
        """(records whose clips now lie one after another, [(record, error)])."""
        results = [future.result() for future in decoding]
        errors = [(i, error) for i, (_, error) in zip(records, results) if error]
        good = [place for place, (record, _) in enumerate(results) if record is not None]
        if self.substitutes and len(good) < len(records):
            first = next(error for record, error in results if record is None)
            raise InputError(
                f"{self.TRIES} videos in a row could not be decoded; the first: {first}"
            )
        for place, full in enumerate(good):
            if place != full:
                slots.patches[place] = slots.patches[full]
        return [results[place][0] for place in good], errors

    def hand_over(self, slots, made):
        """The Batch, or None where none of its clips could be had, now the caller's."""
        batch, errors = made
        for record, error in errors:
            if self.failed is None:
                raise error
            self.failed(int(record), error)
        if batch and self.side:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(slots.copied)
            for x in batch.tensors():
                x.record_stream(stream)
        return batch
