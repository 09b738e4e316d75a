"""What a run looks at to see whether training is well: collapse of the features, the size of its
updates, and where a number that is not finite comes from.
"""

import numpy as np
import torch

from salt import ops


def local(x):
    """The part of a sharded tensor (FSDP2) that this rank holds; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def moments(features):
    """float64 [D + 1, D + 1] of feature vectors [..., D]: the sum of (x, 1)(x, 1)'.

    Those of parts and of ranks add up to those of the whole.
    """
    x = features.detach().reshape(-1, features.shape[-1]).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return x.T @ x


def collapse(sums):
    """(standard deviation, effective rank) of the feature vectors of which `sums` are the moments;
    both fall towards 0 and 1 where features collapse.

    The first is the mean over channels. The second is Roy and Vetterli's (2007): exp of the entropy
    of the centred features' singular values, each as its share of their sum; between 1 and D, and
    at most the number of vectors; 0 where all are the same.
    """
    sums = sums.cpu().numpy()
    mean = sums[-1, :-1] / sums[-1, -1]
    covariance = sums[:-1, :-1] / sums[-1, -1] - np.outer(mean, mean)
    if not np.isfinite(covariance).all():
        return float("nan"), float("nan")
    noise = 1e-12 * np.abs(sums[:-1, :-1].diagonal()).max() / sums[-1, -1]  # of the subtraction
    singular = np.sqrt(np.where((values := np.linalg.eigvalsh(covariance)) > noise, values, 0))
    share = singular[singular > 0] / max(singular.sum(), 1e-300)
    return float(np.sqrt(covariance.diagonal().clip(min=0)).mean()), (
        float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0
    )


def pieces(together):
    """[(weights, means, squares)] -> lists of parts of each, in turn: on a CPU of one that stays in
    its cache, 5 times as fast; on a GPU of as many matrices as 128 MB of each.
    """
    kept, held = [], 0
    for each in together:
        each = [local(x).flatten() for x in each]
        if each[0].device.type == "cpu":
            yield from ([[x] for x in part] for part in zip(*(x.split(1 << 18) for x in each)))
            continue
        kept, held = [*kept, each], held + len(each[0])
        if held >= 1 << 25:
            yield [*zip(*kept)]
            kept, held = [], 0
    if kept:
        yield [*zip(*kept)]


@torch.no_grad()
def update_ratio(optimizer):
    """||change|| / ||weights|| of the last AdamW step over the matrices that decay: float64 [2],
    the squares of both, to be summed over the shards of FSDP2.

    Worked out from the moments (Loshchilov and Hutter 2019, arXiv 1711.05101), so that no copy of
    the weights is kept: with u = lr * Adam's step and c = lr * decay, before = (after + u) / (1 -
    c), and the change is -(c * after + u) / (1 - c). About 1e-3 is usual; far below, nothing is
    learnt any more; far above, the weights are thrown about. A skipped step changed nothing.
    """
    squares = 0
    for group in optimizer.param_groups:
        (b1, b2), c = group["betas"], group["lr"] * group["weight_decay"]
        states = {x: optimizer.state.get(x) for x in group["params"] if group["decays"]}
        stepped = [(x, s["exp_avg"], s["exp_avg_sq"]) for x, s in states.items() if s]
        t = next((local(s["step"]) for s in states.values() if s), None)  # of all alike
        for afters, means, seconds in pieces(stepped):
            u = torch._foreach_sqrt(seconds)
            torch._foreach_mul_(u, (1 - b2**t).rsqrt())
            torch._foreach_add_(u, group["eps"])
            u = torch._foreach_div(means, u)
            torch._foreach_mul_(u, group["lr"] / (1 - b1**t))
            change = torch.stack(torch._foreach_norm(torch._foreach_add(u, afters, alpha=c)))
            before = torch.stack(torch._foreach_norm(torch._foreach_add(u, afters)))
            both = torch.stack([change * (1 - optimizer.found_inf), before]).double()
            squares = squares + both.square().sum(1) / (1 - c) ** 2
    return squares


def not_finite(named):
    """Names of the tensors that hold a value that is not finite, on this rank."""
    return [
        name for name, tensor in named if tensor is not None and not local(tensor).isfinite().all()
    ]


def diagnose(salt, space, clips, batch, loss_of):
    """Where non-finite numbers of a step come from: {'weights', 'targets', 'clips', 'gradients'},
    lists of parameter names and of clips' names.

    clips       clips.Videos or clips.Records, which the batch is of
    loss_of     (loader.Batch) -> what model.salt_loss gives
    targets: clips whose targets are not finite; clips: those whose loss or sums are not; gradients:
    parameters whose gradient, over this rank's clips, is not. The clips go through one by one, so
    that little memory is needed.
    """
    found = {"weights": not_finite(salt.named_parameters()), "targets": [], "clips": []}
    named, bad = dict(salt.named_parameters()), set()
    for i, record in enumerate(batch.records.tolist()):
        one, name = batch.part(slice(i, i + 1)), clips.name(record)[0]
        y, how = space.raw_targets(one.patches, one.latents)
        asked = [drawn.target for drawn in one.masks]
        if salt.predictor.seen is not None:
            asked += [drawn.context for drawn in one.masks]
        targets = [
            ops.normalise_target(ops.masked_gather(y, index), index=index, **how) for index in asked
        ]
        loss, errors = loss_of(one)
        loss.backward()
        bad |= set(not_finite((key, parameter.grad) for key, parameter in named.items()))
        salt.zero_grad(set_to_none=True)
        if not all(target.isfinite().all() for target in targets):
            found["targets"].append(name)
        if not errors.isfinite().all():
            found["clips"].append(name)
    found["gradients"] = [key for key in named if key in bad]
    return found


def in_words(found, loss=float("nan")):
    """What a diagnosis of a step means, as one sentence; loss: that of the step itself."""

    def few(names):
        return ", ".join(map(str, names[:3])) + (
            f" and {len(names) - 3} more" if len(names) > 3 else ""
        )

    if found["weights"]:
        return (
            f"the weights themselves are not finite ({few(found['weights'])}); go back to an"
            " earlier checkpoint"
        )
    if found["targets"]:
        return (
            f"the targets of {few(found['targets'])} are not finite; check the cache with `python"
            " cache_latents.py --verify`"
        )
    if found["clips"] or found["gradients"]:
        loss = f"the loss of {few(found['clips'])}" if found["clips"] else "no loss, but gradients"
        gradient = f"; the gradient of {few(found['gradients'])}" if found["gradients"] else ""
        return f"not finite: {loss}{gradient}; lower --lr, raise --warmup, or try --dtype fp32"
    if np.isfinite(loss):
        return (
            "neither the loss nor any entry of the gradient, but its norm: it overflows, or a"
            " VICReg penalty is not finite; lower --lr, raise --warmup, or lower the penalties'"
            " weights"
        )
    return (
        "done again, that step is finite: the hardware may be failing, or the run is not"
        " deterministic; continue with --resume auto"
    )
