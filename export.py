"""Export the encoder of a checkpoint for code that does not know this project.

    python export.py --checkpoint checkpoints/RUN/best.pth my-encoder
    python export.py --checkpoint RUN --to onnx --probes states.json,arrow.json my-onnx

The folder holds a page, README.md, that says what the encoder is and how to run it, and

    videomae, vjepa2   config.json, model.safetensors and a processor: AutoModel.from_pretrained and
                       AutoVideoProcessor.from_pretrained of `transformers` open it
    safetensors        the same in this project's names, for load_encoder
    onnx               encoder.onnx, uint8 clips [B, T, H, W, 3] -> tokens [B, N, D]
"""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

from salt import config, runs
from salt.errors import InputError

# ----------------------------------------------------------------------------------------- settings
checkpoint = ""  # best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
out: list[str] = []  # folder to make
# auto: videomae where its positions are a table, vjepa2 where they are rotary, else safetensors
to: Literal["auto", "videomae", "vjepa2", "safetensors", "onnx"] = "auto"
ema: bool = False  # the moving average of the weights (train.py --ema)
frames: int | None = None  # of a clip; other ones than in training with rotary positions alone
resolution: int | None = None  # pixels of a clip's side, likewise
probes: str | None = None  # JSON files that probes wrote, for the page; with commas between
teacher_name: str | None = None  # for the page, with its licence
licence: str | None = None  # of what is exported, as the hub names it: mit, cc-by-nc-4.0
# a video: measure on it how far frames that transformers resizes take features from ours
video: str | None = None
# -------------------------------------------------------------------------------------------------
settings = config.apply(globals(), positional="out", least={"frames": 1, "resolution": 1})
if not checkpoint or len(out) != 1:
    raise InputError("give --checkpoint and one folder to make; see --help")
path, folder = runs.checkpoint_of(checkpoint), Path(out[0]).expanduser()
if folder.exists():
    raise InputError(f"{folder} is there already; name a new folder")
if to == "onnx":
    os.environ["SALT_OPS"] = "reference"  # a graph of plain operations

import av  # after the settings, so that --help and a mistyped flag answer at once
import torch

from salt import encoders, ops
from salt.card import card
from salt.checkpoint import load_checkpoint
from salt.files import write_whole
from salt.video import read_clip
from salt.views import frame_numbers

# ---- the encoder, and what it can be
saved = load_checkpoint(path, ema)
encoder = encoders.student_of(saved, path).eval().requires_grad_(False).at(frames, resolution)
c = encoder.config
own = encoders.EXPORTS.get(c.positions, "safetensors")
kind = own if to == "auto" else to
if kind in encoders.EXPORTS.values() and kind != own:
    can = " or ".join(dict.fromkeys((own, "safetensors", "onnx")))
    raise InputError(
        f"--to {kind}: the positions of {path} are {c.positions}, which {kind} has not; it can be"
        f" {can}"
    )
if video and kind not in encoders.EXPORTS.values():
    raise InputError("--video measures folders that transformers opens; leave it out")
found = {}
for each in probes.split(",") if probes else ():
    try:
        found[each] = json.loads(Path(each).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--probes {each} cannot be read: {error}") from None


class FromClips(torch.nn.Module):
    """uint8 clips [B, T, H, W, 3] -> tokens [B, N, D]."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder

    def forward(self, clips):
        return encoder(encoder.normalise(ops.patchify(clips, c.patch, c.tubelet)))


def noise(count):
    shape = (count, c.frames, c.size, c.size, 3)
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def write_onnx(folder):
    """encoder.onnx, and what onnxruntime makes of it where it is installed."""
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError:
        raise InputError("--to onnx needs onnx: pip install onnx onnxscript onnxruntime") from None
    shapes = {"clips": {0: torch.export.Dim("batch")}}
    names = {"input_names": ["clips"], "output_names": ["tokens"]}
    how = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, **names}
    program = torch.onnx.export(FromClips().eval(), (noise(2),), **how)
    file = folder / "encoder.onnx"
    large = sum(x.numel() for x in encoder.parameters()) > 1 << 28  # a file holds 2 GB at most
    program.save(str(file), external_data=large)
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime is not installed: the file was not tried")
        return
    session = onnxruntime.InferenceSession(str(file))
    for count in (1, 3):
        (made,) = session.run(None, {"clips": noise(count).numpy()})
        expected = encoder.encode(noise(count))
        far = (torch.from_numpy(made) - expected).abs().max() / expected.abs().max()
        print(f"onnxruntime at a batch of {count}: {far:.1e} of the largest feature from ours")
        if not far < 1e-4:
            raise InputError(f"onnxruntime makes other features of {file}; it is not kept")


@torch.no_grad()
def compare(folder):
    """Lines on a video's features by transformers alone and by ours."""
    try:
        from transformers import AutoModel, AutoVideoProcessor

        processor = AutoVideoProcessor.from_pretrained(folder)
    except ImportError as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(
            f"--video needs transformers and a torchvision that fits this torch ({why})"
        ) from None
    net = AutoModel.from_pretrained(folder).eval()
    clip = read_clip(video, encoder.view)
    ours = encoder.encode(clip)
    with av.open(video, "r") as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picked = [whole[i] for i in frame_numbers(len(whole), encoder.view)]
    cut = {"do_resize": False, "do_center_crop": False}
    lines = []
    for says, given, how in (
        ("frames as SALT-VLA cuts them", list(clip), cut),
        ("whole frames, resized by transformers", picked, {}),
    ):
        theirs = net(**processor(given, return_tensors="pt", **how)).last_hidden_state[0]
        far = (theirs - ours).norm() / ours.norm()
        lines.append(f"- {says}: features {far:.2g} of their norm from SALT-VLA's own")
    height, width = whole[0].shape[:2]
    return [f"Measured on a video of {width} x {height} pixels:", "", *lines]


# ---- write it beside its place, and put it there whole
part = folder.with_name(f"{folder.name}.part")
shutil.rmtree(part, ignore_errors=True)
part.mkdir(parents=True)
try:
    compared = []
    if kind == "onnx":
        write_onnx(part)
    else:
        encoders.write_folder(encoder, part, "salt_vla" if kind == "safetensors" else kind)
    if video:
        compared = compare(part)
    said = ema, teacher_name, licence, compared
    page = card(folder.name, kind, encoder, saved, found, *said)
    write_whole(str(part / "README.md"), page.encode())
    os.replace(part, folder)
finally:
    shutil.rmtree(part, ignore_errors=True)
print("\n".join(compared))
files = sorted(folder.iterdir())
size = sum(file.stat().st_size for file in files) / 1e6
print(f"{folder}: {kind}, {', '.join(file.name for file in files)}, {size:.1f} MB")
