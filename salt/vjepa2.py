"""V-JEPA 2's weights (Assran et al. 2025, arXiv 2506.09985) in their two formats, in and out.

The readers give weights under the names of model.Encoder, and the fields of its EncoderConfig. Its
positions are rotary, whole numbers of tubelets and patches, so that an encoder takes clips of any
shape (Encoder.at). In `transformers` places are counted by the configuration's crop_size alone:
under it a clip of another size gets wrong ones, without a word.
"""

from pathlib import Path

import torch

from salt.errors import InputError
from salt.pretrained import (
    check_gelu,
    normalisation,
    processor,
    read_weights,
    square,
    take,
    view_of,
    write_json,
)
from salt.torch_files import whole
from salt.views import IMAGENET_MEAN, IMAGENET_STD

NAMES = {  # ours -> `transformers`, after the block number; the original has attn for attention
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.proj.": "attention.proj.",
    "fc1.": "mlp.fc1.",
    "fc2.": "mlp.fc2.",
}
# what may stand beside the encoder: predictor, attentive pooling, head
NOT_THE_ENCODER = ("predictor.", "pooler.", "classifier.")
ENCODERS = ("target_encoder", "ema_encoder", "encoder")  # in an original file, the best first
HEADS = {1280: 16}  # of huge; the others' are 64 wide
OF_V_JEPA_1 = (8 * 14 * 14, 8 * 24 * 24)  # tokens of its tables, of 224 and 384 pixels


def read_folder(config, pixels, folder):
    """What a V-JEPA 2 folder in `transformers` format holds; transformers is not imported.

    config, pixels  of pretrained.read_configuration
    Returns (EncoderConfig fields, weights under our names, weights files, View fields or None,
    whether they are those of its training clips, which a processor does not say in full).
    """
    check_gelu(config, folder)
    state, files = read_weights(folder)
    file = files[0]
    state = {name.removeprefix("vjepa2."): tensor.float() for name, tensor in state.items()}
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in state.items()
        if not name.startswith(NOT_THE_ENCODER)
    }
    depth = config.get("num_hidden_layers", 24)
    ours = {
        "patch_embed.weight": take(state, "embeddings.patch_embeddings.proj.weight", file),
        "patch_embed.bias": take(state, "embeddings.patch_embeddings.proj.bias", file),
        "norm.weight": take(state, "layernorm.weight", file),
        "norm.bias": take(state, "layernorm.bias", file),
    }
    ours["patch_embed.weight"] = ours["patch_embed.weight"].flatten(1)
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [f"layer.{i}.attention.{part}.{kind}" for part in ("query", "key", "value")]
            if kind == "weight" or parts[0] in state:
                joined = torch.cat([take(state, part, file) for part in parts])
                ours[f"blocks.{i}.attn.qkv.{kind}"] = joined
            for mine, name in NAMES.items():
                theirs = f"layer.{i}.{name}{kind}"
                ours[f"blocks.{i}.{mine}{kind}"] = take(state, theirs, file)
    dim = config.get("hidden_size", 1024)
    fields = {
        "dim": dim,
        "depth": depth,
        "heads": config.get("num_attention_heads", 16),
        "mlp_dim": int(dim * config.get("mlp_ratio", 4.0)),  # as `transformers` rounds
        "frames": config.get("frames_per_clip", 64),
        "size": config.get("crop_size", 256),
        "patch": square(config.get("patch_size", 16), folder),
        "tubelet": config.get("tubelet_size", 2),
        "eps": config.get("layer_norm_eps", 1e-6),
        "positions": "rope",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        **biases_apart(ours),
        **normalisation(pixels, folder),
    }
    # its processor's class knows one short side, whatever the file says
    edges = {"size": {"shortest_edge": short_side_of(fields["size"])}}
    view = config.get("salt_view")
    stated = view or view_of({**pixels, **edges}, fields, of_class=256)
    return fields, ours, files, stated, view is not None


def biases_apart(ours):
    """Take attn.qkv.bias apart, in place, into those of queries, keys and values; EncoderConfig
    fields on which of them there are. Keys' that are all 0, as this project writes them, are none.
    """
    names = [name for name in ours if name.endswith(".attn.qkv.bias")]
    keyed = any(ours[name].chunk(3)[1].any() for name in names)
    for name in names:
        block = name.removesuffix("qkv.bias")
        parts = zip(("q_bias", "k_bias", "v_bias"), ours.pop(name).chunk(3))
        ours |= {block + part: bias for part, bias in parts if keyed or part != "k_bias"}
    return {"qkv_bias": bool(names), "key_bias": keyed}


def is_original(saved):
    """Whether a torch file is one of V-JEPA's own code."""
    return any(
        isinstance(saved.get(name), dict) and any("blocks.0.norm1" in key for key in saved[name])
        for name in ENCODERS
    )


def read_original(saved, path):
    """(EncoderConfig fields, weights under our names) of an original .pt file, of V-JEPA 2's
    moving average where it has one.

    Frames and pixels, which it does not state, are those of its last training, 64 of 256. Raises
    InputError on V-JEPA's first version, which looks alike and has a table of positions, and on
    V-JEPA 2.1, whose encoders have more parts.
    """
    state = next(saved[name] for name in ENCODERS if isinstance(saved.get(name), dict))
    state = {
        name.removeprefix("module.").removeprefix("backbone."): tensor.float()
        for name, tensor in whole(state, path).items()
    }
    table = state.pop("pos_embed", None)  # V-JEPA 2's files hold one, and its encoder no use for it
    if table is not None and table.ndim > 1 and table.shape[1] in OF_V_JEPA_1:
        raise InputError(
            f"{path} has a table of {table.shape[1]} positions, as V-JEPA's first version has;"
            " V-JEPA 2 is read, whose positions are rotary"
        )
    kernel = take(state, "patch_embed.proj.weight", path)  # [D, 3, tubelet, patch, patch]
    if kernel.ndim != 5:
        raise InputError(f"{path}: its patches are {list(kernel.shape)}, not of a video")
    ours = {"patch_embed.weight": kernel.flatten(1)}
    known = {"patch_embed.proj.bias": "patch_embed.bias"}
    known |= {f"norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")}
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        for kind in ("weight", "bias"):
            known[f"blocks.{i}.attn.qkv.{kind}"] = f"blocks.{i}.attn.qkv.{kind}"
            for mine, name in NAMES.items():
                theirs = f"blocks.{i}.{name.replace('attention', 'attn')}{kind}"
                known[theirs] = f"blocks.{i}.{mine}{kind}"
    for name, tensor in state.items():
        if name != "patch_embed.proj.weight":
            if name not in known:
                raise InputError(f"{path} has the weight {name}, which a V-JEPA 2 encoder lacks")
            ours[known[name]] = tensor
    dim = kernel.shape[0]
    fields = {
        "dim": dim,
        "depth": depth,
        "heads": HEADS.get(dim, max(1, dim // 64)),
        "mlp_dim": take(ours, "blocks.0.fc1.weight", path).shape[0],
        "frames": 64,
        "size": 256,
        "patch": kernel.shape[-1],
        "tubelet": kernel.shape[2],
        "eps": 1e-6,
        "positions": "rope",
        **biases_apart(ours),
    }
    return fields, ours


def write_folder(c, weights, folder, view):
    """Write an encoder's weights, of EncoderConfig c, as a V-JEPA 2 folder of `transformers`.

    view: fields of the View that its clips are cut under, kept in config.json as salt_view. The
    predictor that VJEPA2Model has beside its encoder is there with no block and nothing in it: ask
    for skip_predictor=True.
    """
    from safetensors.torch import save_file

    if not c.final_norm:
        raise InputError("transformers' V-JEPA 2 has a final norm, and this encoder none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        if name == "patch_embed.weight":
            kernel = tensor.view(c.dim, 3, c.tubelet, c.patch, c.patch)
            state["encoder.embeddings.patch_embeddings.proj.weight"] = kernel
        elif name == "patch_embed.bias":
            state["encoder.embeddings.patch_embeddings.proj.bias"] = tensor
        elif name.startswith("norm."):
            state[f"encoder.layernorm.{name[5:]}"] = tensor
        else:
            _, number, rest = name.split(".", 2)
            layer = f"encoder.layer.{number}."
            if rest == "attn.qkv.weight":
                for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                    state[f"{layer}attention.{part}.weight"] = rows.contiguous()
            elif rest.endswith("_bias"):
                part = {"q": "query", "k": "key", "v": "value"}[rest.removeprefix("attn.")[0]]
                state[f"{layer}attention.{part}.bias"] = tensor
                if part == "query" and not c.key_bias:
                    state[f"{layer}attention.key.bias"] = torch.zeros_like(tensor)
            else:
                old, new = next((old, new) for old, new in NAMES.items() if rest.startswith(old))
                state[f"{layer}{new}{rest[len(old) :]}"] = tensor
    none = {"pred_hidden_size": 6, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 0}
    predictor = {
        "embeddings.mask_tokens": (1, 1, 1, 6),
        "embeddings.predictor_embeddings.weight": (6, c.dim),
        "embeddings.predictor_embeddings.bias": (6,),
        "layernorm.weight": (6,),
        "layernorm.bias": (6,),
        "proj.weight": (c.dim, 6),
        "proj.bias": (c.dim,),
    }
    state |= {f"predictor.{name}": torch.zeros(shape) for name, shape in predictor.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "hidden_size": c.dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "mlp_ratio": c.mlp_dim / c.dim,
        "frames_per_clip": c.frames,
        "crop_size": c.size,
        "patch_size": c.patch,
        "tubelet_size": c.tubelet,
        "in_chans": 3,
        "layer_norm_eps": c.eps,
        "qkv_bias": c.qkv_bias,
        "hidden_act": "gelu",
        **none,
        "pred_num_mask_tokens": 1,
        "salt_view": view,
    }
    write_json(folder / "config.json", config)
    # V-JEPA 2's own class knows one short side for a crop, whatever its file says; this one does
    # what the file says, and is else the same
    own = view["crop"] == "center" and view["short_side"] == short_side_of(c.size)
    kind = "VJEPA2VideoProcessor" if own else "LlavaNextVideoVideoProcessor"
    said = processor({"video_processor_type": kind}, c, view["short_side"], view)
    write_json(folder / "video_preprocessor_config.json", said)


def short_side_of(size):
    """That frames get before VJEPA2VideoProcessor crops them to `size`."""
    return int(size * 256 / 224)
