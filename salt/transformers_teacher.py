"""A vision model of `transformers` as a teacher, from a folder: an image model is run frame by
frame. VideoMAE and V-JEPA 2 are models of our own (videomae.py, vjepa2.py) and not run by this.
"""

import inspect

import torch
import torch.nn.functional as F

from salt.errors import InputError
from salt.pretrained import (
    digest_of_weights,
    square,
    stated_normalisation,
    view_of,
    weight_files,
)
from salt.user_teacher import UserTeacher, check_layers
from salt.views import View

# models of videos whose tokens are those of tubelets, by time, then rows: where their tubelet is
VIDEO_MODELS = {"vivit": lambda config: config.tubelet_size[0]}
# models of videos whose tokens lie otherwise, or have no place
NOT_THESE = ("timesformer", "xclip", "vjepa2_ac")
TUBELET = 2  # frames a token of an image model, whose own frames are one by one
FRAMES = 16


def open_folder(path, name, config, pixels, device, dtype, asked):
    """The UserTeacher of a folder in `transformers` format.

    name            for logs
    config, pixels  of pretrained.read_configuration
    dtype           'fp32' or 'bf16': of the weights and all that is computed
    asked           teachers.Asked
    """
    kind = config.get("model_type")
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{path} holds the model type {kind!r}, which needs `transformers`:"
            " pip install transformers; VideoMAE and V-JEPA 2 are read without it"
        ) from None
    if kind in NOT_THESE or not kind:
        raise InputError(
            f"{path} holds the model type {kind!r}, whose tokens are no tubelets in order; a"
            " function of yours can put them so: --teacher file.py:function"
        )
    files = weight_files(path)
    net = opened(path, transformers)
    net = getattr(net, "vision_model", net)  # of CLIP and SigLIP, which have one for text, too
    net = net.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    digest = digest_of_weights(files)
    try:
        made = ModelTeacher(net.eval().requires_grad_(False), path, digest, pixels, dtype, asked)
    except AttributeError as error:
        raise InputError(
            f"{path} holds a {kind}, which is no transformer of patches ({error}); a function of"
            " yours can make it a teacher: --teacher file.py:function"
        ) from None
    made.name = name
    teacher = UserTeacher(
        made, str(path), path / "config.json", digest_of_weights([path / "config.json"]), device
    )
    teacher.identity |= asked.to_dict()
    if made.view:
        teacher.view = made.view
    elif "size" in pixels or "crop_size" in pixels:
        teacher.note = f"{path}: its processor cuts frames in a way that no view can say"
    return teacher


def opened(path, transformers):
    """The network of a folder, all of whose weights are there: transformers itself would draw those
    that are not at random.
    """
    verbose = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of weights of heads that are not used
    try:
        net, told = transformers.AutoModel.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of many kinds, and all of them of this folder
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"transformers {transformers.__version__} cannot open {path}: {why}"
        ) from None
    finally:
        transformers.logging.set_verbosity(verbose)
    absent = [name for name in told["missing_keys"] if "pooler." not in name]
    if absent:
        raise InputError(
            f"{path} lacks {len(absent)} weights of a {net.config.model_type}, {sorted(absent)[0]}"
            " among them; is it the model that it says it is?"
        )
    return net


class ModelTeacher:
    """A vision model of `transformers`, by the contract of user_teacher.py.

    net     the network, frozen
    path    its folder
    sha256  of its weights
    pixels  what its processor says
    """

    def __init__(self, net, path, sha256, pixels, dtype, asked):
        c, kind = net.config, net.config.model_type
        self.net, self.path, self.asked, self.compute = net, path, asked, dtype
        self.of_videos = kind in VIDEO_MODELS
        self.name, self.sha256 = path.name, sha256
        self.patch = square(getattr(c, "patch_size", None) or c.tubelet_size[-1], path)
        self.tubelet = VIDEO_MODELS[kind](c) if self.of_videos else TUBELET
        own = square(c.image_size, path)
        if "crop_size" not in pixels and "do_center_crop" not in pixels:
            pixels = {**pixels, "do_center_crop": False}  # only some classes have a crop at all
        cut = pixels.get("crop_size") if pixels.get("do_center_crop") is not False else None
        cut = cut or pixels.get("size") or own
        cut = cut if isinstance(cut, dict) else {"height": cut}
        self.frames = asked.frames or (c.num_frames if self.of_videos else FRAMES)
        if self.of_videos and (self.frames != c.num_frames or asked.of_frames != "mean"):
            raise InputError(
                f"{path} is a model of videos of {c.num_frames} frames; leave --frames and"
                " --teacher_frames out"
            )
        stated = cut.get("height") or cut.get("shortest_edge") or own
        self.resolution = asked.resolution or stated
        self.dim = c.hidden_size * len(asked.layers)
        ours = stated_normalisation(pixels, path)
        self.mean, self.std = ours["mean"], ours["std"]
        self.view = self.cut(pixels, stated)
        self.other_size = self.resolution != own
        check_layers(asked.layers, c.num_hidden_layers)

    def cut(self, pixels, size):
        """The View that its processor cuts frames by, at the resolution that is asked for; None
        where none says it.
        """
        fields = view_of(pixels, {"frames": self.frames, "size": size})
        shape = {"frames": self.frames, "size": self.resolution}
        plain = View(**shape, short_side=self.resolution)
        return plain.cut_as(View.from_dict(fields)) if fields else None

    def encode(self, clips):
        """float32 [B, N, D] of uint8 clips [B, T, H, W, 3]."""
        dtype = next(self.net.parameters()).dtype
        mean, std = (torch.tensor(each, device=clips.device) for each in (self.mean, self.std))
        frames = ((clips.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3).to(dtype)
        b, t, _, h, w = frames.shape
        inputs = {"pixel_values": frames if self.of_videos else frames.flatten(0, 1)}
        known = inspect.signature(self.net.forward).parameters
        if self.other_size and "interpolate_pos_encoding" in known:
            inputs["interpolate_pos_encoding"] = True
        found = self.net(**inputs, output_hidden_states=any(k != -1 for k in self.asked.layers))
        parts = []
        for layer in self.asked.layers:
            tokens = (
                found.last_hidden_state if layer == -1 else found.hidden_states[layer]
            ).float()
            norm = layer != -1 or self.asked.norm
            parts.append(F.layer_norm(tokens, tokens.shape[-1:]) if norm else tokens)
        rows, columns = h // self.patch, w // self.patch
        tokens = self.of_patches(
            torch.cat(parts, -1), rows * columns * (t // self.tubelet if self.of_videos else 1)
        )
        if self.of_videos:
            return tokens
        tokens = tokens.unflatten(0, (b, t // self.tubelet, self.tubelet))  # [B, T/2, 2, n, D]
        tokens = tokens[:, :, -1] if self.asked.of_frames == "last" else tokens.mean(2)
        return tokens.flatten(1, 2)

    def of_patches(self, tokens, count):
        """Without cls and register tokens, which stand first."""
        c = self.net.config
        beside = tokens.shape[1] - count
        registers = getattr(c, "num_register_tokens", 0)
        if beside not in (0, 1, 1 + registers):
            raise ValueError(
                f"{self.path}: {tokens.shape[1]} tokens where {count} are patches: its tokens are"
                " of another kind"
            )
        return tokens[:, beside:]
