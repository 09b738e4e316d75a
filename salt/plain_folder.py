"""An encoder as a folder of its own names and shape, for those that are no model of `transformers`:
config.json, with EncoderConfig's fields, and model.safetensors.
"""

import dataclasses
from pathlib import Path

from salt.errors import InputError
from salt.pretrained import read_weights, write_json


def read_folder(config, pixels, folder):
    """What such a folder holds, as videomae.read_folder says it; `pixels` tells nothing more."""
    fields = config.get("encoder")
    if not isinstance(fields, dict):
        raise InputError(f"{folder / 'config.json'} has no encoder, a table of its shape")
    state, files = read_weights(folder)
    view = config.get("salt_view")
    return fields, state, files, view, view is not None


def write_folder(c, weights, folder, view):
    """Write an encoder's weights, of EncoderConfig c; view: fields of the View of its clips."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "salt_vla", "encoder": dataclasses.asdict(c), "salt_view": view}
    write_json(folder / "config.json", config)
