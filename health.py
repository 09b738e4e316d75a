"""What a run looks at to see whether training is well: collapse of the features, the size of its updates, and where a number that is not finite comes from."""
import numpy as np
import torch

import model
import ops


def local(x):
    """The part of a sharded tensor (FSDP2) that this rank holds; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def moments(features):
    """float64 [D + 1, D + 1] of feature vectors [..., D]: the sum of (x, 1)(x, 1)'. Those of parts and of ranks add up to those of the whole."""
    x = features.detach().reshape(-1, features.shape[-1]).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return x.T @ x


def collapse(moments):
    """(standard deviation, effective rank) of the feature vectors that `moments` were made of; both fall towards 0 and 1 where features collapse.

    The first is the mean over channels. The second is Roy and Vetterli's (2007): exp of the entropy of the centred features' singular values, each as its
    share of their sum; between 1 and D, and at most the number of vectors; 0 where all are the same.
    """
    moments = moments.cpu().numpy()
    mean = moments[-1, :-1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / moments[-1, -1] - np.outer(mean, mean)
    if not np.isfinite(covariance).all():
        return float("nan"), float("nan")
    noise = 1e-12 * np.abs(moments[:-1, :-1].diagonal()).max() / moments[-1, -1]  # of the subtraction
    singular = np.sqrt(np.where((values := np.linalg.eigvalsh(covariance)) > noise, values, 0))
    share = singular[singular > 0] / max(singular.sum(), 1e-300)
    return float(np.sqrt(covariance.diagonal().clip(min=0)).mean()), float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


@torch.no_grad()
def update_ratio(optimizer):
    """||change|| / ||weights|| of the last AdamW step over the matrices that decay, float64 [2] as squares to be summed over the shards of FSDP2 and divided.

    Worked out from the moments (Loshchilov and Hutter 2019, arXiv 1711.05101), so that no copy of the weights is kept: with u the step that Adam takes,
    before = (after + lr u) / (1 - lr decay). About 1e-3 is usual; far below, nothing is learnt any more; far above, it is thrown about. A skipped step changed nothing.
    """
    squares = 0
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["decays"] else ():
            if not (state := optimizer.state.get(parameter)):
                continue
            (b1, b2), after, t = group["betas"], local(parameter), local(state["step"])
            u = local(state["exp_avg"]) / (1 - b1 ** t) / ((local(state["exp_avg_sq"]) / (1 - b2 ** t)).sqrt() + group["eps"])
            before = (after + group["lr"] * u) / (1 - group["lr"] * group["weight_decay"])
            squares = squares + torch.stack([(after - before).double().square().sum() * (1 - optimizer.found_inf), before.double().square().sum()])
    return squares


def not_finite(named):
    """Names of the tensors that hold a value that is not finite, on this rank."""
    return [name for name, tensor in named if tensor is not None and not local(tensor).isfinite().all()]


def diagnose(salt, space, names, batch, loss):
    """Where non-finite numbers of a step come from: {'weights', 'targets', 'clips', 'gradients'}, lists of parameter names and of clips' names.

    names: of the batch's clips. targets: clips whose targets are not finite; clips: those whose predictions or loss are not; gradients: parameters
    whose gradient, over this rank's clips, is not. The clips go through one by one, so that little memory is needed.
    """
    found = {"weights": not_finite(salt.named_parameters()), "targets": [], "clips": [], "gradients": []}
    named, bad = dict(salt.named_parameters()), set()
    for i, name in enumerate(names):
        one = slice(i, i + 1)
        patches, latents = batch.patches[one], None if batch.latents is None else batch.latents[one]
        drawn = {family: ops.Masks(both.context[one], both.target[one]) for family, both in batch.masks.items()}
        y, how = space.raw_targets(patches, latents)
        targets = [ops.normalise_target(ops.masked_gather(y, both.target), index=both.target, **how) for both in drawn.values()]
        predictions = salt(patches, drawn)
        error, _, _, gradients = model.salt_loss(predictions, patches, latents, drawn, space, loss)
        torch.autograd.backward(list(predictions.values()), list(gradients.values()))
        bad |= set(not_finite((key, parameter.grad) for key, parameter in named.items()))
        salt.zero_grad(set_to_none=True)
        if not all(target.isfinite().all() for target in targets):
            found["targets"].append(name)
        if not (error.isfinite() and all(prediction.isfinite().all() for prediction in predictions.values())):
            found["clips"].append(name)
    found["gradients"] = [key for key in named if key in bad]
    return found


def in_words(found):
    """What a diagnosis means, as one sentence."""
    few = lambda names: ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if found["weights"]:
        return f"the weights themselves are not finite ({few(found['weights'])}); go back to an earlier checkpoint"
    if found["targets"]:
        return f"the targets of {few(found['targets'])} are not finite; check the cache with `python cache_latents.py --verify`"
    if found["clips"] or found["gradients"]:
        loss = f"the loss of {few(found['clips'])}" if found["clips"] else "no loss, but gradients"
        gradient = f"; the gradient of {few(found['gradients'])}" if found["gradients"] else ""
        return f"not finite: {loss}{gradient}; lower --lr, raise --warmup, or try --dtype fp32"
    return "done again, that step is finite: the hardware may be failing, or the run is not deterministic; continue with --resume auto"
