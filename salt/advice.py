"""What a run is warned of before it starts: what made runs stall in studies/, and it does, too."""


def causes(s, steps):
    """A line for each cause, of a run on latents. s: train.py's settings; steps: of all of it."""
    if s.target == "pixels":
        return
    if not s.context_loss:
        yield (
            "--context_loss 0: small students learned next to nothing of states (R2 .00, with it"
            " .10), and less of the latents (.08, with it .28, after 2,000 steps)"
        )
    if steps < 250:
        yield (
            f"{steps} steps: small students left the plateau at R2 0 after 160 - 370, none in 111;"
            " a smaller --batch_size makes more of them out of as many clips"
        )
    decay = steps * mean_decay(s)
    if decay > 2:
        yield (
            f"weight decay takes {decay:.1f} e-folds over the run: at 3 a small student stayed at"
            " R2 0, with 1 not; lower --weight_decay_end"
        )


def mean_decay(s):
    """Mean over a run of learning rate times decay, both on half a cosine, without the warm-up."""
    falling = (s.lr - s.lr_end) * (s.weight_decay / 2 + (s.weight_decay_end - s.weight_decay) / 8)
    return falling + s.lr_end * (s.weight_decay + s.weight_decay_end) / 2
