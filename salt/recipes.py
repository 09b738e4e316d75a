"""Named sets of train.py's settings, `--recipe NAME`. A flag that is given beside it wins. A value
may be a function of the settings as they stand then.
"""


def with_batch(value, batch):
    """A learning rate that was for batches of `batch` clips, by the square-root rule for Adam."""
    return lambda s: value * (s["batch_size"] / batch) ** 0.5


def of_latents(value, of_pixels):
    return lambda s: of_pixels if s["target"] == "pixels" else value


# what is left open at the top of train.py
LEFT_OPEN = {
    # states of bodies, R2: .098 with it, .000 without, three seeds (docs/PLATEAU.md)
    "context_loss": of_latents(1.0, 0.0),
}
RECIPES = {
    # R2 +.075 +- .022, states -.006 +- .016, in 78 seconds of steps instead of 95, and an export
    # that runs at any shape: study 2, row rope_cross_attention, seeds 4, 5, 6 (docs/RESULTS.md)
    "light": {"positions": "rope", "predictor_attention": "context"},
    # the paper's (arXiv 2509.24317) as notes on it give them. What is not the paper's: its batch of
    # 3072; a warm-up of 4 % of the steps from a third of the rate; random crops of scale .3 - 1 and
    # aspect .75 - 1.35, for which cache_latents.py --views stands in with moved squares
    "salt": {
        "masks": ["short", "long"],
        "loss": of_latents("l1", "mse"),
        "target_norm": "none",
        "context_loss": 0.0,
        "positions": "rope",
        "predictor_depth": 12,
        "predictor_dim": 384,
        "predictor_heads": 16,
        "lr": with_batch(6.25e-4, 3072),
        "lr_end": with_batch(1e-6, 3072),
    },
}
