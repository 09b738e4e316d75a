"""Weights that a student begins with, `--init_from`: those of another encoder of its shape, or of
an image ViT, inflated over time.
"""

import re
from pathlib import Path

import torch

from salt import given_paths, hub
from salt.encoders import FORMATS, encoder_of_folder
from salt.errors import InputError
from salt.pretrained import check_gelu, read_configuration, read_weights, stated_normalisation
from salt.teachers import encoder_of_file
from salt.torch_files import from_file

# ours -> theirs, behind blocks.N. and its like: `transformers`' ViT, its DINOv2, timm
VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
DINOV2 = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TIMM = {**DINOV2, "attn.proj": "attn.proj"}
# weights of a block's output that some multiply with a number a channel, which is taken in
SCALES = {
    "attn.proj": ("layer_scale1.lambda1", "ls1.gamma"),
    "fc2": ("layer_scale2.lambda1", "ls2.gamma"),
}


def initialise(student, path):
    """Give a student the weights at `path`, in place; returns a line for the log.

    path  a checkpoint of train.py, a folder or file of VideoMAE or V-JEPA 2, a folder of an image
          ViT (`transformers`' vit and dinov2, or timm's), or the name of such a one on the hub
    Pixels are normalised as the student does it: the difference goes into the patch embedding.
    Biases on keys, which our students lack, are left out. Raises InputError where shapes differ.
    """
    folder = hub.download(path) if given_paths.of_the_hub(path) else Path(path).expanduser()
    inflated = ""
    if folder.is_dir() and kind_of(folder) not in FORMATS:
        state, mean, std, inflated = from_file(folder, of_image_model, folder, student.config)
    elif folder.exists():
        found = encoder_of_folder(folder)[0] if folder.is_dir() else encoder_of_file(folder)
        c, own = found.config, student.config
        for name in ("dim", "depth", "heads", "mlp_dim", "patch", "tubelet"):
            if getattr(c, name) != getattr(own, name):
                raise InputError(
                    f"--init_from {path} has {name} {getattr(c, name)}, the student"
                    f" {getattr(own, name)}; see --size, --depth and --patch"
                )
        state, mean, std = found.state_dict(), c.mean, c.std
        if c.positions != own.positions:
            inflated = f" (whose positions are {c.positions}, the student's {own.positions})"
    else:
        raise InputError(f"there is nothing at {path}, from which --init_from is to take weights")
    normalised_otherwise(state, mean, std, student.config)
    expected = student.state_dict()
    left = [name for name in state if name not in expected]
    absent = [name for name in expected if name not in state]
    for name in expected.keys() & state.keys():
        if state[name].shape != expected[name].shape:
            raise InputError(
                f"--init_from {path}: {name} has shape {list(state[name].shape)}, the student's"
                f" {list(expected[name].shape)}; see --size, --depth and --patch"
            )
    if any(not name.startswith("norm.") for name in absent):
        raise InputError(f"--init_from {path} lacks {absent[0]} and {len(absent) - 1} others")
    student.load_state_dict({**expected, **{k: v for k, v in state.items() if k in expected}})
    kinds = sorted({name.rpartition(".")[2] for name in left} | {"norm" for _ in absent[:1]})
    without = f", without {', '.join(kinds)}" if kinds else ""
    return f"the student begins with the weights of {path}{inflated}{without}"


def kind_of(folder):
    """The model type of a folder; None where it is timm's."""
    return from_file(folder, read_configuration, folder)[0].get("model_type")


# weights beside the blocks that are left: places, classes' and masks' tokens, heads
NOT_TAKEN = re.compile(
    "(head|classifier|pooler|fc_norm"
    "|.*(pos_embed|position_embeddings|rope|cls_token|reg_token|register_tokens|mask_token))"
)


def of_image_model(folder, c):
    """(weights under our names, mean, std, how) of an image ViT's folder, for EncoderConfig c."""
    config, pixels = read_configuration(folder)
    check_gelu(config, folder)
    state, _ = read_weights(folder)
    state = {re.sub(r"^(vit|dinov2)\.", "", name): x.float() for name, x in state.items()}
    kinds = {"vit": VIT, "dinov2": DINOV2, "dinov2_with_registers": DINOV2}
    names, block, final = kinds.get(config.get("model_type")), "encoder.layer.{}.", "layernorm"
    patches = "embeddings.patch_embeddings.projection"
    heads = config.get("num_attention_heads", 12)
    if "patch_embed.proj.weight" in state:
        names, block, final, patches = TIMM, "blocks.{}.", "norm", "patch_embed.proj"
        usual = max(1, state["patch_embed.proj.weight"].shape[0] // 64)
        heads = (config.get("model_args") or {}).get("num_heads", usual)
    if names is None:
        raise InputError(
            f"--init_from {folder}: weights of the kind {config.get('model_type')!r} are not read;"
            f" of image models vit, dinov2 and timm's are, of videos {', '.join(FORMATS)}"
        )
    if heads != c.heads:
        raise InputError(f"--init_from {folder} has {heads} attention heads, the student {c.heads}")
    image = state.pop(f"{patches}.weight")  # [D, 3, p, p]
    video = image[:, :, None].expand(-1, -1, c.tubelet, -1, -1) / c.tubelet
    bias = state.pop(f"{patches}.bias", torch.zeros(len(image)))
    ours = {"patch_embed.weight": video.flatten(1), "patch_embed.bias": bias}
    for kind in ("weight", "bias"):
        if f"{final}.{kind}" in state:  # some have a head's own norm in its place
            ours[f"norm.{kind}"] = state.pop(f"{final}.{kind}")
    count = 0
    while f"{block.format(count)}{names['norm1']}.weight" in state:
        ours |= of_block(state, block.format(count), names, f"blocks.{count}.")
        count += 1
    if count != c.depth:
        raise InputError(
            f"--init_from {folder} has {count} blocks, the student {c.depth}; see --depth"
        )
    unread = sorted(name for name in state if not NOT_TAKEN.match(name))
    if unread:
        raise InputError(
            f"--init_from {folder} has the weight {unread[0]} and {len(unread) - 1} others that our"
            " blocks have no place for"
        )
    said = pixels or config.get("pretrained_cfg", {})
    if "image_mean" not in said and "mean" in said:  # timm's config.json
        said = {"image_mean": said["mean"], "image_std": said["std"]}
    own = stated_normalisation(said, folder)
    return ours, own["mean"], own["std"], f", inflated over {c.tubelet} frames"


def of_block(state, theirs, names, mine):
    """The weights of one block under our names, taken out of `state`."""
    found = {}
    for kind in ("weight", "bias"):
        for ours, name in names.items():
            value = take(state, f"{theirs}{name}.{kind}")
            for scale in SCALES.get(ours, ()):
                if theirs + scale in state:
                    value = state[theirs + scale].view(-1, *[1] * (value.ndim - 1)) * value
            found[f"{mine}{ours}.{kind}"] = value
        parts = [f"{theirs}attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
        whole = f"{theirs}attn.qkv.{kind}"
        if whole in state:
            found[f"{mine}attn.qkv.{kind}"] = state.pop(whole)
        elif parts[0] in state:
            found[f"{mine}attn.qkv.{kind}"] = torch.cat([take(state, part) for part in parts])
    for scale in sum(SCALES.values(), ()):
        state.pop(theirs + scale, None)
    bias = found.pop(f"{mine}attn.qkv.bias", None)
    if bias is not None:
        q, k, v = bias.chunk(3)
        found |= {f"{mine}attn.q_bias": q, f"{mine}attn.k_bias": k, f"{mine}attn.v_bias": v}
    return found


def take(state, name):
    if name not in state:
        raise InputError(f"--init_from: the weight {name} is not there")
    return state.pop(name)


def normalised_otherwise(state, mean, std, c):
    """Change a patch embedding, in place, so that pixels normalised as EncoderConfig c says give
    what those normalised by mean and std gave before.
    """
    mean, std, own_mean, own_std = (torch.tensor(x) for x in (mean, std, c.mean, c.std))
    kernel = state["patch_embed.weight"].unflatten(1, (3, -1))  # [D, 3, tubelet * p * p]
    shift = (own_mean - mean) / std
    state["patch_embed.bias"] = state["patch_embed.bias"] + kernel.sum(2) @ shift
    state["patch_embed.weight"] = (kernel * (own_std / std)[:, None]).flatten(1)
