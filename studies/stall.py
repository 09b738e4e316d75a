"""Study 1: what makes a run stall? One change at a time from a run that learns.

The reference is make demo's student at half its steps: 8 epochs of 1,000 clips of the demo's videos
(112 pixels, 8 frames), layer-normed latents of an EfficientNet, a student 192 wide and 4 deep. Its
learning rate is by the square-root rule what 2.4e-3 is for batch 24.

Fixed before the first run: a cause is ranked by the states of bodies that a linear head reads from
300 labelled videos, against its reference, seed by seed, over seeds 1, 2, ...; a change counts
where its interval over seeds does not hold 0, and of so many rows one in twenty does so by chance.
R2, held out, stands beside it, and its difference where masks, latents and their space are the
same; so does surprise. Set when 35 runs of seed 1 were there: as good, or of no account, is a mean
difference of less than .01 (states) or .02 (R2).
"""

from studies import report
from studies.world import TRAINING, Row

PANELS = report.curves, report.losses
# the worst row of each of four causes, by seed 1
CURVES = "batch_72_lr_x1", "batch_16_lr_x0.25", "other_clips", "decay_of_200000_steps_on_all"
LOSSES = (  # what a long run's decay does
    "reference",
    "decay_of_70000_steps",
    "decay_of_70000_steps_on_all",
    "decay_of_200000_steps",
    "decay_of_200000_steps_on_all",
)

REFERENCE = {
    **TRAINING,
    "context_loss": 1.0,
    "target_norm": "layer_norm",
    "max_steps": 500,
    "eval_every": 50,
    "log_every": 10,
}
# what train.py does where it is not told otherwise, by 2026-11
DEFAULTS = {
    "masks": "short,long",
    "context_loss": 0,
    "target_norm": "none",
    "lr": 2e-4,
    "weight_decay_end": 0.4,
    "grad_clip": 0.02,
}

# ---- what the product must not offer, as changes to train.py's lines
UPDATE = "    norm = optimiser.update(optimizer, parameters, grad_clip, meter.loss)"
IN_BFLOAT16 = (
    UPDATE + "  # not finite: skipped\n",
    UPDATE
    + """
    with torch.no_grad():
        for p in parameters:
            for kept in (p, *(x for key, x in optimizer.state[p].items() if key != "step")):
                kept.copy_(kept.bfloat16())
""",
)
DECAY_ON_ALL = ('decay * group["decays"]  # matrices alone', "decay")
BATCH = (
    "    batch = work.with_latents(meter.waiting_for(batches))  # on the device; this rank's part\n"
)
OTHER_CLIPS = (
    BATCH,
    BATCH
    + """    if step == run.step:
        from salt.cache import open_cache
        other = open_cache("NEEDED")
        assert other.ids.digest.digest() == clips.cache.ids.digest.digest()
        assert other.patches(0).shape == clips.cache.patches(0).shape
    clips_of_batch = [torch.from_numpy(other.patches(int(i))) for i in batch.records]
    batch = batch._replace(patches=torch.stack(clips_of_batch))
""",
)
# V-JEPA's collator cuts all masks of a batch to one length by leaving out their last tokens
CUT_AT_THE_END = (
    "# ---- log and device\n",
    """import math
import numpy as np
import salt.masks as drawing

def drawn_and_cut(epoch, seed, sample_id, grid, counts, blocks, redraws, sizes, low, high, stream):
    random = drawing.Random(seed, epoch, sample_id, stream)
    size = (grid[0], *sizes[random.below(len(sizes))].tolist()) if len(sizes) else None
    for _ in range(redraws + 1):
        union = drawing.union_of(random, grid, blocks, size, low, high).reshape(-1)
        if union.sum() >= counts[1] and (~union).sum() >= counts[0]:
            return np.flatnonzero(~union)[: counts[0]], np.flatnonzero(union)[: counts[1]]
    raise RuntimeError("no union of these counts")

drawing.draw_one_mask = drawn_and_cut
drawing.has_kernel = lambda ids: False
# ---- log and device
""",
)


def rates(batch_size, *factors):
    """Rows of other learning rates at a batch size, as many clips seen as in the reference."""
    by_rule = REFERENCE["lr"] * (batch_size / REFERENCE["batch_size"]) ** 0.5
    steps = round(REFERENCE["max_steps"] * REFERENCE["batch_size"] / batch_size)
    every = max(1, steps // 10)
    shape = {"batch_size": batch_size, "max_steps": steps, "eval_every": every}
    best = "reference" if batch_size == REFERENCE["batch_size"] else f"batch_{batch_size}_lr_x1"
    for factor in factors:
        flags = {**shape, "lr": float(f"{by_rule * factor:.3g}")}
        against = "reference" if factor == 1 else best
        row = Row(
            "the square-root rule holds: best at x1 of every batch size", flags, against=against
        )
        if best != "reference" or factor != 1:
            yield f"batch_{batch_size}_lr_x{factor:g}", row


ROWS = {
    "reference": Row("learns: R2 above 0, states above untrained networks'", controls=True),
    "bfloat16_weights": Row(
        "weights and both moments: small updates are rounded away, so it stalls",
        patches={"train.py": [IN_BFLOAT16]},
    ),
    "bfloat16_weights_lr_x0.25": Row(
        "worse still: the smaller the update, the more of it is rounded away",
        {"lr": REFERENCE["lr"] / 4},
        patches={"train.py": [IN_BFLOAT16]},
        against="batch_16_lr_x0.25",
    ),
    "decay_on_all": Row("of no account at a decay of .05", patches={"train.py": [DECAY_ON_ALL]}),
    "decay_on_all_0.4": Row(
        "norms shrink: worse than the same decay on matrices alone",
        {"weight_decay_end": 0.4},
        patches={"train.py": [DECAY_ON_ALL]},
        against="weight_decay_end_0.4",
    ),
    "other_clips": Row(
        "latents of whole frames made square for clips of their middle squares: the largest effect",
        patches={"train.py": [OTHER_CLIPS]},
        needs=["center"],
    ),
    "masks_short_long": Row("R2 is of other masks; states as good", {"masks": "short,long"}),
    "masks_cut_at_the_end": Row(
        "the clip's end is hardly seen and hardly asked for: worse than short,long",
        {"masks": "short,long"},
        patches={"train.py": [CUT_AT_THE_END]},
        against="masks_short_long",
    ),
    "weight_decay_end_0.2": Row("a little worse", {"weight_decay_end": 0.2}),
    "weight_decay_end_0.4": Row("worse: the decay of long runs", {"weight_decay_end": 0.4}),
    "decay_of_70000_steps": Row(
        "as many e-folds of decay, 1.0, as ten epochs of Something-Something v2 at train.py's own"
        " lr, decay and batch: falls, stalls, rebounds",
        {"weight_decay": 0.56, "weight_decay_end": 5.6},
    ),
    "decay_of_70000_steps_on_all": Row(
        "worse: norms and biases shrink, too",
        {"weight_decay": 0.56, "weight_decay_end": 5.6},
        patches={"train.py": [DECAY_ON_ALL]},
        against="decay_of_70000_steps",
    ),
    "decay_of_200000_steps_on_all": Row(
        "three times as much, seen in seed 1 of the row above to stall: the loss rises again",
        {"weight_decay": 1.6, "weight_decay_end": 16.0},
        patches={"train.py": [DECAY_ON_ALL]},
        against="decay_of_200000_steps",
    ),
    "decay_of_200000_steps": Row(
        "worse than a third of it, and better than on norms and biases, too",
        {"weight_decay": 1.6, "weight_decay_end": 16.0},
    ),
    **dict(rates(16, 0.25, 0.5, 2, 4)),
    **dict(rates(8, 0.5, 1, 2)),
    **dict(rates(72, 0.25, 0.5, 1, 2)),
    "warmup_0": Row("of no account at this size", {"warmup": 0}),
    "warmup_250": Row("worse: half the run is spent below the rate", {"warmup": 250}),
    "lr_constant": Row("worse: the last gains come with a falling rate", {"lr_end": 2e-3}),
    "grad_clip_0.02": Row(
        "slows AdamW little, since it divides by its own scale", {"grad_clip": 0.02}
    ),
    "grad_clip_0.1": Row("likewise", {"grad_clip": 0.1}),
    "grad_clip_off": Row("of no account", {"grad_clip": 0}),
    "target_none": Row("a few loud channels and tokens take the loss", {"target_norm": "none"}),
    "target_standardise": Row("as layer_norm", {"target_norm": "standardise"}),
    "l1": Row("as good", {"loss": "l1"}),
    "target_none_l1": Row(
        "better than MSE on raw targets",
        {"target_norm": "none", "loss": "l1"},
        against="target_none",
    ),
    "target_standardise_l1": Row(
        "as good", {"target_norm": "standardise", "loss": "l1"}, against="target_standardise"
    ),
    "no_context_loss": Row(
        "states fall below untrained networks', R2 does not show it", {"context_loss": 0}
    ),
    "views_4": Row(
        "R2 a little up: other crops (in fact: moments) of as many videos", latents="net_views4"
    ),
    "views_16": Row("as views_4: more than the epochs of this run", latents="net_views16"),
    "steps_x4": Row("R2 up: a run of 500 steps is short", {"max_steps": 2000, "eval_every": 200}),
    "predictor_6": Row("R2 up, states down", {"predictor_depth": 6}),
    "predictor_12": Row("likewise, more so", {"predictor_depth": 12}),
    "new_videos_x4": Row(
        "better than as many clips of a quarter of the videos",
        {"max_steps": 2000, "eval_every": 200},
        latents="net_new_videos",
        against="steps_x4",
    ),
    "no_context_loss_x4": Row(
        "a longer run does not mend it",
        {"max_steps": 2000, "eval_every": 200, "context_loss": 0},
        against="steps_x4",
    ),
    "bfloat16_weights_x4": Row(
        "the longer the run, the more of its small updates are lost",
        {"max_steps": 2000, "eval_every": 200},
        patches={"train.py": [IN_BFLOAT16]},
        against="steps_x4",
    ),
    "product_defaults_x4": Row(
        "stays at R2 0",
        {**DEFAULTS, "max_steps": 2000, "eval_every": 200},
        against="product_defaults",
    ),
    "teacher_pixels_10": Row(
        "a teacher of 50 steps from pixels, by its own schedule: little of the states to pass on",
        latents="pixels_50",
    ),
    "teacher_pixels_30": Row("150 steps: more of them", latents="pixels_150"),
    "teacher_pixels_100": Row(
        "500 steps: as good as 150, worse than ImageNet's EfficientNet", latents="pixels_500"
    ),
    "product_defaults": Row("stalls at R2 0: what train.py's defaults make of this run", DEFAULTS),
    "product_defaults_but_lr": Row(
        "most of the difference: R2 above 0",
        {**DEFAULTS, "lr": REFERENCE["lr"]},
        against="product_defaults",
    ),
    "product_defaults_but_context_loss": Row(
        "most of the states, R2 as it was",
        {**DEFAULTS, "context_loss": 1.0},
        against="product_defaults",
    ),
    "product_defaults_but_target_norm": Row(
        "R2 of another space; states as they were",
        {**DEFAULTS, "target_norm": "layer_norm"},
        against="product_defaults",
    ),
    "product_defaults_but_masks": Row(
        "R2 above 0, of other masks; states as they were",
        {**DEFAULTS, "masks": "ratio"},
        against="product_defaults",
    ),
}
