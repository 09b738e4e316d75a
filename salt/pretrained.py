"""A folder in `transformers` format, read without it: what its configuration and its processor
say, and its weights. Which model it is, videomae.py and vjepa2.py know.
"""

import hashlib
import json
import math

from salt.errors import InputError
from salt.files import sha256
from salt.torch_files import load_pickle, whole

STATED = ("image_mean", "image_std")
# that may say mean and std
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def read_json(path):
    """The content of a small JSON file."""
    if path.stat().st_size > 1 << 24:
        raise InputError(f"{path} has {path.stat().st_size} bytes; configurations are small")
    return json.loads(path.read_text(encoding="utf-8"))


def read_configuration(folder):
    """(config.json, what a processor's file says of pixels or {}) of a folder."""
    path = folder / "config.json"
    try:
        config = read_json(path)
        said = [read_json(folder / name) for name in PROCESSORS if (folder / name).is_file()]
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no config.json; a teacher folder holds config.json and model.safetensors"
            " or pytorch_model.bin"
        ) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"a JSON file in {folder} is malformed: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is no JSON object")
    # of processor_config.json
    said = [each.get("video_processor", each.get("image_processor", each)) for each in said]
    # null is what a newer version writes where an older one is silent
    said = [{k: v for k, v in each.items() if v is not None or k in STATED} for each in said]
    return config, next((each for each in said if "image_mean" in each), said[0] if said else {})


def check_gelu(config, folder):
    """Raises InputError where the MLPs have another function than model.Block's."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise InputError(
            f"{folder / 'config.json'}: hidden_act is {config['hidden_act']!r}; only exact gelu is"
            " supported"
        )


INDEX = "model.safetensors.index.json"  # names the file of each weight, where there are several


def weight_files(folder):
    """The files of a folder's weights. Raises InputError where there are none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        files = [
            folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        ]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise InputError(f"{folder} lacks {', '.join(absent)}, which its {INDEX} names")
        return files
    if not (folder / "pytorch_model.bin").is_file():
        raise InputError(f"{folder} has no model.safetensors and no pytorch_model.bin")
    return [folder / "pytorch_model.bin"]


def digest_of_weights(files):
    """SHA-256 of a file; of several that of their own ones, one after the other."""
    digests = [sha256(file) for file in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_weights(folder):
    """({name: tensor}, the files that they are in) of a folder in `transformers` format."""
    files = weight_files(folder)
    if files[0].suffix == ".bin":
        return whole(load_pickle(files[0]), files[0]), files
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = {}
    for file in files:
        try:
            state |= whole(load_file(file), file)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged: {error}") from None
    return state, files


def take(state, name, path):
    """The weight of this name. Raises InputError where there is none."""
    if name not in state:
        raise InputError(f"{path} lacks the weight {name}; is it the model that it says it is?")
    return state[name]


def square(value, folder):
    """The side of an image or patch, which may be given twice."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        return value[0]
    if not isinstance(value, int):
        raise InputError(
            f"{folder / 'config.json'}: images and patches must be square, not {value}"
        )
    return value


def normalisation(pixels, folder):
    """{'mean', 'std'} of a processor, as far as it says."""
    scale = pixels.get("rescale_factor", 1 / 255)
    if pixels.get("do_rescale") is False or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise InputError(
            f"{folder} scales pixels otherwise than by 1/255 (do_rescale, rescale_factor, of its"
            f" {' or '.join(PROCESSORS)}); write the same scale into image_mean and image_std"
        )
    if pixels.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return {mine: pixels[f"image_{mine}"] for mine in ("mean", "std") if f"image_{mine}" in pixels}


def stated_normalisation(pixels, folder):
    """The same of a model whose class has values of its own where its files are silent, which are
    not known here. Raises InputError where they are.
    """
    found = normalisation(pixels, folder)
    if len(found) < 2:
        raise InputError(
            f"{folder} does not say how pixels are normalised: no image_mean and image_std in"
            f" {' or '.join(PROCESSORS)}; save its processor there, too (processor.save_pretrained)"
        )
    return found


def view_of(pixels, fields, of_class=224):
    """View fields of a processor's resizing and cropping to the encoder's frames, as far as a View
    can say it; None where it cannot, or nothing is said.

    of_class  side that the processor's class crops to where its file names none: the short side
              resized to it by bilinear interpolation, the middle square of it
    """
    side, edges = fields["size"], pixels.get("size", of_class)
    if not isinstance(edges, dict):  # without a crop older classes mean both sides
        crops = "crop_size" in pixels or pixels.get("do_center_crop") is not False
        edges = {"shortest_edge": edges} if crops else {"height": edges, "width": edges}
    kept = pixels.get("crop_size", of_class) if pixels.get("do_center_crop") is not False else side
    kept = kept if isinstance(kept, dict) else {"height": kept, "width": kept}
    how = {0: None, 2: "bilinear", 3: "bicubic", 4: "area"}.get(pixels.get("resample", 2))
    if (
        not pixels.keys() & {"size", "crop_size", "resample", "do_center_crop"}
        or not how
        or set(kept.values()) != {side}
    ):
        return None
    if "shortest_edge" in edges:
        cut = (
            {"short_side": edges["shortest_edge"], "crop": "center"}
            if pixels.get("do_center_crop") is not False
            else None
        )
    else:
        cut = (
            {"short_side": side, "crop": "squash"}
            if (edges.get("height"), edges.get("width")) == (side, side)
            else None
        )
    return cut and {"frames": fields["frames"], "size": side, "interpolation": how, **cut}


def processor(kind, c, short_side, view):
    """The content of a processor's JSON file, of EncoderConfig c and View fields: frames of any
    size get this short side (or, where the view squashes, both), then their middle is cut out.
    Other code than swscale does so, and features differ a little.
    """
    square = {"height": c.size, "width": c.size}
    return {
        **kind,
        "do_resize": True,
        "size": square if view["crop"] == "squash" else {"shortest_edge": short_side},
        # PIL's numbers; 2 is bilinear
        "resample": 3 if view["interpolation"] == "bicubic" else 2,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": c.mean,
        "image_std": c.std,
    }


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
