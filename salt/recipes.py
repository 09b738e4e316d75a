"""Named sets of train.py's settings, `--recipe NAME`. A flag that is given beside it wins. A value
may be a function of the settings as they stand then.
"""


def with_batch(value, batch):
    """A learning rate that was for batches of `batch` clips, by the square-root rule for Adam."""
    return lambda s: value * (s["batch_size"] / batch) ** 0.5


def of_latents(value, of_pixels):
    return lambda s: of_pixels if s["target"] == "pixels" else value


RECIPES = {
    # the paper's (arXiv 2509.24317) as notes on it give them, where it is another thing than the
    # default; crops are made by cache_latents.py --views N, its warm-up is 4 % of its steps
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
