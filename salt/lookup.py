"""Look-up, a dumb predictor that knows which scene a clip shows and nothing else: the mean, at each
position, of the targets of the training clips that are most like it. R2 measured from it is what a
student learnt beyond that.

Clips are compared by their targets' difference from the per-position mean, averaged over time at
each place of the frame: the distance of a held-out clip from a training clip is summed over the
places of its context, weighted by how many context tokens lie there. Of the training clips these
averages alone are kept, of many channels a random projection (Johnson and Lindenstrauss 1984). The
rows of the few neighbours are read from the cache, once for each held-out clip and family, since
masks and neighbours stay as they are. docs/NUMBERS.md has what one average over all places misses.
"""

import time

import numpy as np
import torch
from einops import reduce
from torch.nn.functional import one_hot

from salt import ops, ranks, score
from salt.cache import open_cache
from salt.cache_format import agree_on
from salt.errors import InputError
from salt.masks import keyed_sample

NEIGHBOURS = 5
WIDTH = 32  # numbers that are kept of a place: 50 MB of 2,000 clips of 14 x 14 places
AT_A_TIME = 8  # records that are read together while they are pooled


class Lookup:
    """Look-up among some records of a training cache.

    cache    the Cache; .kind of its rows are the targets made of
    space    score.Space in which clips are compared
    chosen   {'records': int64 [M], 'pooled': float32 [M, places, WIDTH]}, from `choose`; a
             checkpoint keeps it
    threads  that read
    """

    def __init__(self, cache, space, chosen, threads):
        self.cache = cache
        self.space = space
        self.chosen = chosen
        self.threads = threads
        self.kind = kind_of(space)
        self.pooled = chosen["pooled"].flatten(1)
        self.sizes = chosen["pooled"].square().sum(2)  # [M, places]
        self.known = {}  # {a held-out record: {family: the squared error of its look-up}}

    @torch.no_grad()
    def errors(self, batch, space):
        """{family: float64 [B]}: squared errors in `space`, summed over the target elements of each
        clip of a held-out loader.Batch.
        """
        records = batch.records.tolist()
        if not all(record in self.known for record in records):
            found = {drawn.family: self.error(batch, drawn, space) for drawn in batch.masks}
            for place, record in enumerate(records):
                self.known[record] = {name: values[place] for name, values in found.items()}
        return {
            drawn.family: np.array([self.known[record][drawn.family] for record in records])
            for drawn in batch.masks
        }

    def error(self, batch, drawn, space):
        """float64 [B] of one family's masks."""
        y, how = self.space.raw_targets(batch.patches, batch.latents)
        context = ops.masked_gather(y, drawn.context)
        context = ops.normalise_target(context, index=drawn.context, **how)  # [B, Kc, D]
        near = self.nearest(context - self.space.zero[drawn.context], drawn.context)
        y, how = space.raw_targets(batch.patches, batch.latents)
        index = drawn.target.cpu()
        wanted = torch.zeros(y.shape[:2], dtype=torch.bool).scatter_(1, index, True)
        rows = empty_rows(self.cache, self.kind, len(y))
        total = 0
        for neighbours in near.T:
            self.cache.read_rows(self.kind, neighbours, rows, wanted, self.threads)
            theirs = ops.masked_gather(rows, index).to(y.device)  # [B, Kt, D]
            total = total + ops.normalise_target(theirs, index=drawn.target, **how)
        return score.squared_errors(total / near.shape[1], y, drawn.target, how)

    def nearest(self, context, index):
        """Records of the training clips nearest to the context of clips, int64 [B, k].

        context, index: its difference from the per-position mean [B, Kc, D], its positions [B, Kc]
        """
        places = self.sizes.shape[1]
        at = one_hot(index % places, places).to(context.dtype)  # [B, Kc, places]
        # sums over time [B, places, WIDTH], which have the counts in them
        sums = torch.einsum("bkp,bkd->bpd", at, projected(context)).flatten(1).cpu()
        distances = at.sum(1).cpu() @ self.sizes.T - 2 * sums @ self.pooled.T  # less a constant
        order = distances.argsort(dim=1, stable=True)[:, :NEIGHBOURS]
        return self.chosen["records"][order].numpy()


def projected(pooled):
    """[..., D] as [..., WIDTH] that keeps distances but for a few percent; the same for all."""
    dim = pooled.shape[-1]
    if dim <= WIDTH:
        return pooled
    matrix = torch.randn(dim, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    return pooled @ matrix.to(pooled)


def kind_of(space):
    """Which rows of a cache the targets are made of."""
    return "patches" if space.target == "pixels" else "latents"


def holds(cache, kind):
    return cache is not None and (cache.has_latents if kind == "latents" else cache.has_patches)


def empty_rows(cache, kind, count):
    """Uninitialised rows of so many records, as Cache.read_rows fills them."""
    if kind == "patches":
        return torch.empty(count, *cache.patch_shape, dtype=torch.uint8)
    return torch.empty(count, *cache.latent_shape, dtype=torch.float16)


@torch.no_grad()
def choose(cache, space, count, seed, threads, log):
    """{'records', 'pooled'} of `count` records from all over a training cache, for a Lookup."""
    begin = time.perf_counter()
    kind = kind_of(space)
    records = keyed_sample(len(cache), count, seed)
    time_steps = cache.view.frames // cache.tubelet
    pooled = []
    for start in range(0, len(records), AT_A_TIME):
        few = records[start : start + AT_A_TIME]
        rows = empty_rows(cache, kind, len(few))
        cache.read_rows(kind, few, rows, threads=threads)
        rows = rows.to(space.zero.device)
        its = space.all_targets(rows, rows) - space.zero  # [b, N, D]
        pooled.append(
            projected(reduce(its, "b (t place) d -> b place d", "mean", t=time_steps)).cpu()
        )
    log(
        f"look-up: {len(records)} of {len(cache)} training clips pooled in"
        f" {time.perf_counter() - begin:.1f} s"
    )
    return {"records": torch.from_numpy(records), "pooled": torch.cat(pooled)}


def lookup_of_training(s, work, space, saved, log):
    """The Lookup of a run, or None, where a line says why there is none.

    s, work  train.py's settings and its task.Task
    space    of its targets
    saved    the checkpoint that it goes on from, or None
    """
    if not work.held_out or not s.lookup_clips:
        return None
    cache, why = work.clips.cache, None
    if work.measured_on != "held-out":
        why = "these clips are training clips themselves"
    elif not holds(cache, kind_of(space)):
        why = f"it reads the {kind_of(space)} of training clips, and no --cache holds them"
    if why:
        log(f"look-up is not measured: {why}")
        return None

    def chosen():
        kept = saved and saved.get("lookup")
        return kept or choose(cache, space, s.lookup_clips, s.eval_seed, s.threads, log)

    return Lookup(cache, space, ranks.from_rank_0(chosen), s.threads)


def lookup_of_table(s, table, measured_on, log):
    """The Lookup of a comparison.Table, of the checkpoint that R2 is measured from; or None, where
    a line says why there is none.

    s            eval_distill.py's settings
    measured_on  'held-out', or 'training'
    Raises InputError where --train_cache is not the one that this checkpoint was trained on.
    """
    path = table.measured_from
    _, space, saved = table.loaded[path]
    cache, why = None, None
    count = saved["settings"].get("lookup_clips", 2000)
    if measured_on != "held-out":
        why = "these clips are training clips themselves"
    elif not count:
        why = f"{path} was trained with --lookup_clips 0"
    else:
        cache, why = training_cache(s.train_cache, path, saved, kind_of(space))
    if why:
        log(f"look-up is not measured: {why}")
        return None

    def chosen():
        kept = saved.get("lookup")
        seed = saved["settings"]["eval_seed"]
        return kept or choose(cache, space, count, seed, s.threads, log)

    return Lookup(cache, space, ranks.from_rank_0(chosen), s.threads)


def training_cache(named, path, saved, kind):
    """(the Cache that the checkpoint at `path` was trained on, None), or (None, why not)."""
    folder = named or saved["settings"]["cache"]
    if not folder:
        return None, f"{path} was trained without a cache"
    try:
        cache = open_cache(folder)
        if not agree_on(saved["identity"]["train"], cache.identity) or not holds(cache, kind):
            raise InputError(f"{folder} is not the cache that {path} was trained on")
    except InputError as error:
        if named:
            raise
        return None, f"{error}; --train_cache says where it is"
    return cache, None
