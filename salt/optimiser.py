"""The optimiser's side of a step: groups of parameters, the update, the moving average."""

from typing import Any

import torch


def update(optimizer, parameters, clip, loss=None):
    """One AdamW step with the gradients scaled down to the global norm `clip` (0: as they are);
    none at all where a gradient, or `loss`, is not finite.

    One pass over the gradients makes their norm, and one by PyTorch's fused kernel updates: it
    takes the factor (`grad_scale`) and whether to leave everything alone (`found_inf`) from the
    device, so that nothing waits. Gradients are dropped. Returns the norm before clipping, float32
    scalar.
    """
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if hasattr(norm, "full_tensor"):
        sharded: Any = norm
        norm = sharded.full_tensor()  # of FSDP2's shards
    optimizer.grad_scale = (norm / clip).clamp(min=1) if clip else torch.ones_like(norm)
    optimizer.found_inf = (
        ~norm.isfinite() if loss is None else ~(norm.isfinite() & loss.isfinite())
    ).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def move_average(average, module, decay):
    """average = decay * average + (1 - decay) * module, over all parameters, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def parameter_groups(module, weight_decay):
    """AdamW groups: decay on matrices alone; biases, norms, every other 1-D parameter and the mask
    tokens stay without.
    """

    def decayed(name, parameter):
        return parameter.dim() >= 2 and not name.endswith("mask_tokens")

    named = [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    return [
        {
            "params": [p for n, p in named if decayed(n, p)],
            "weight_decay": weight_decay,
            "decays": True,
        },
        {
            "params": [p for n, p in named if not decayed(n, p)],
            "weight_decay": 0.0,
            "decays": False,
        },
    ]
