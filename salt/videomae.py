"""VideoMAE's weights in its two formats, in and out.

The readers give weights under the names of model.Encoder, and the fields of its EncoderConfig;
model.py builds the module.
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

SAVED_NAMES = {  # original VideoMAE names -> ours, after the block number
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.q_bias": "attn.q_bias",
    "attn.v_bias": "attn.v_bias",
    "attn.proj.": "attn.proj.",
    "mlp.fc1.": "fc1.",
    "mlp.fc2.": "fc2.",
}
# names of it that are known; the last five are no encoder's
BESIDE_BLOCKS = (
    "patch_embed.proj.",
    "norm.",
    "head.",
    "fc_norm.",
    "decoder.",
    "mask_token",
    "encoder_to_decoder.",
)
TRANSFORMERS_NAMES = {  # ours -> `transformers`, after the block number
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "fc1.": "intermediate.dense.",
    "fc2.": "output.dense.",
    "attn.q_bias": "attention.attention.q_bias",
    "attn.v_bias": "attention.attention.v_bias",
}


def read_folder(config, pixels, folder):
    """What a VideoMAE folder in `transformers` format holds; transformers is not imported.

    config, pixels  of pretrained.read_configuration
    Returns (EncoderConfig fields, weights under our names, weights files, View fields or None,
    whether they are those of its training clips, which a processor does not say in full).
    """
    check_gelu(config, folder)
    weights, files = read_weights(folder)
    file = files[0]
    state = {
        name.removeprefix("videomae."): tensor.float()
        for name, tensor in weights.items()
        if not name.startswith("decoder")
    }
    projection = "embeddings.patch_embeddings.projection."
    for name in state:
        if name.startswith("embeddings.") and not name.startswith(projection):
            raise InputError(
                f"{file} has the weight {name}, which a VideoMAE encoder lacks; its positions are"
                " sines"
            )
    ours = {
        "patch_embed.weight": take(state, f"{projection}weight", file).flatten(1),
        "patch_embed.bias": take(state, f"{projection}bias", file),
    }
    depth = config.get("num_hidden_layers", 12)
    first = "encoder.layer.0.attention.attention."
    biases = next((names for names in BIASES if first + names[0] in state), None)
    for i in range(depth):
        block = f"encoder.layer.{i}."
        attention = f"{block}attention.attention."
        parts = [take(state, f"{attention}{x}.weight", file) for x in ("query", "key", "value")]
        ours[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        for mine, name in zip(("q_bias", "v_bias"), biases or (), strict=False):
            ours[f"blocks.{i}.attn.{mine}"] = take(state, attention + name, file)
        for mine, name in TRANSFORMERS_NAMES.items():
            for kind in ("weight", "bias") if name.endswith(".") else ():
                ours[f"blocks.{i}.{mine}{kind}"] = take(state, f"{block}{name}{kind}", file)
    final_norm = not config.get("use_mean_pooling", True)
    for kind in ("weight", "bias") if final_norm else ():
        ours[f"norm.{kind}"] = take(state, f"layernorm.{kind}", file)
    fields = {
        "dim": config.get("hidden_size", 768),
        "depth": depth,
        "heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "frames": config.get("num_frames", 16),
        "size": square(config.get("image_size", 224), folder),
        "patch": square(config.get("patch_size", 16), folder),
        "tubelet": config.get("tubelet_size", 2),
        "eps": config.get("layer_norm_eps", 1e-12),
        "qkv_bias": biases is not None,
        "final_norm": final_norm,
        **normalisation(pixels, folder),
    }
    view = config.get("salt_view")
    return fields, ours, files, view or view_of(pixels, fields), view is not None


BIASES = (("q_bias", "v_bias"), ("query.bias", "value.bias"))  # older and newer `transformers`


def read_videomae(saved, path, heads_of):
    """(EncoderConfig fields, weights under our names) of an original VideoMAE .pth.

    heads_of(width, depth) gives the heads, which it does not state; frames and size come from its
    arguments, else are 16 and 224.
    """
    arguments = saved.get("args") or {}
    arguments = arguments if isinstance(arguments, dict) else vars(arguments)
    state = next(
        (
            saved[key]
            for key in ("model", "module", "state_dict")
            if isinstance(saved.get(key), dict)
        ),
        saved,
    )
    state = {name.removeprefix("module."): tensor for name, tensor in whole(state, path).items()}
    if any(name.startswith("encoder.") for name in state):
        state = {
            name.removeprefix("encoder."): tensor
            for name, tensor in state.items()
            if name.startswith("encoder.")
        }
    kernel = take(state, "patch_embed.proj.weight", path)  # [D, 3, tubelet, patch, patch]
    dim = kernel.shape[0]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    ours = {
        "patch_embed.weight": kernel.flatten(1).float(),
        "patch_embed.bias": take(state, "patch_embed.proj.bias", path).float(),
    }
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            mine = next((new for old, new in SAVED_NAMES.items() if rest.startswith(old)), None)
            if mine is None:
                raise InputError(f"{path} has the weight {name}, which a VideoMAE encoder lacks")
            ours[
                f"blocks.{number}.{mine}{rest.rsplit('.', 1)[1] if mine.endswith('.') else ''}"
            ] = tensor.float()
        elif not name.startswith(BESIDE_BLOCKS):
            raise InputError(
                f"{path} has the weight {name}, which a VideoMAE encoder lacks; its positions are"
                " sines"
            )
    final_norm = "norm.weight" in state
    if final_norm:
        ours["norm.weight"] = state["norm.weight"].float()
        ours["norm.bias"] = take(state, "norm.bias", path).float()
    fields = {
        "dim": dim,
        "depth": depth,
        "heads": heads_of(dim, depth),
        "mlp_dim": take(ours, "blocks.0.fc1.weight", path).shape[0],
        "frames": arguments.get("num_frames", 16),
        "size": arguments.get("input_size", 224),
        "patch": kernel.shape[-1],
        "tubelet": kernel.shape[2],
        "eps": 1e-6,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "final_norm": final_norm,
    }
    return fields, ours


def write_folder(c, weights, folder, view):
    """Write an encoder's weights, of EncoderConfig c, as a VideoMAE folder of `transformers`.

    view: fields of the View that its clips are cut under, kept in config.json as salt_view. The
    image processor is for frames of that view, which it leaves as they are and normalises; the
    video processor for whole frames, which it resizes and crops as the view does.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        if name == "patch_embed.weight":
            state["embeddings.patch_embeddings.projection.weight"] = tensor.view(
                c.dim, 3, c.tubelet, c.patch, c.patch
            )
        elif name == "patch_embed.bias":
            state["embeddings.patch_embeddings.projection.bias"] = tensor
        elif name.startswith("norm."):
            state[f"layernorm.{name[5:]}"] = tensor
        else:
            _, number, rest = name.split(".", 2)
            if rest == "attn.qkv.weight":
                for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                    state[f"encoder.layer.{number}.attention.attention.{part}.weight"] = (
                        rows.contiguous()
                    )
            else:
                old, new = next(
                    (old, new) for old, new in TRANSFORMERS_NAMES.items() if rest.startswith(old)
                )
                state[f"encoder.layer.{number}.{new}{rest[len(old) :]}"] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "architectures": ["VideoMAEModel"],
            "model_type": "videomae",
            "hidden_size": c.dim,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.heads,
            "intermediate_size": c.mlp_dim,
            "num_frames": c.frames,
            "image_size": c.size,
            "patch_size": c.patch,
            "tubelet_size": c.tubelet,
            "num_channels": 3,
            "layer_norm_eps": c.eps,
            "qkv_bias": c.qkv_bias,
            "use_mean_pooling": not c.final_norm,
            "hidden_act": "gelu",
            "salt_view": view,
        },
    )
    kind = {"image_processor_type": "VideoMAEImageProcessor"}
    write_json(folder / "preprocessor_config.json", processor(kind, c, c.size, view))
    kind = {"video_processor_type": "VideoMAEVideoProcessor"}
    said = processor(kind, c, view["short_side"], view)
    write_json(folder / "video_preprocessor_config.json", said)
