"""The encoder as a user has it: its view, clips, `encode`, the exported folder, README's lines."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from model import EncoderConfig
from salt import encoders, ops, teachers
from salt.checkpoint import CHECKPOINT_PARTS, save_checkpoint
from salt.errors import InputError
from salt.files import sha256
from salt.video import clip_of_frames, read_clip
from salt.views import View
from tests.test_data import write_video
from tests.test_model import clips_for, shake

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
README = Path(model.__file__).with_name("README.md")


def textured(count, height, width):
    """Frames in which each pixel, channel and time differs, smooth enough for a codec."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width]
    frames = np.stack([x * 3 + t * 5, y * 4 + t * 3, x + y + t * 9], -1)
    return (127 + 120 * np.sin(frames / 31)).astype(np.uint8)


def tiny_encoder(view, **other):
    encoder = shake(
        model.Encoder(
            EncoderConfig(
                dim=48,
                depth=2,
                heads=4,
                mlp_dim=96,
                frames=view.frames,
                size=view.size,
                patch=8,
                **other,
            )
        )
    )
    encoder.view = view
    return encoder


def save(encoder, path):
    parts = dict.fromkeys(CHECKPOINT_PARTS)
    save_checkpoint(
        path,
        {
            **parts,
            "student": encoder.state_dict(),
            "encoder_config": model.plain(encoder.config),
            "view": encoder.view.to_dict(),
        },
    )


# -------------------------------------------------------------------------------- clips

VIEWS = [
    View(8, 48, 48),
    View(4, 32, 40, interpolation="bicubic"),
    View(4, 40, 40, crop="squash"),
    View(4, 32, 64, view=3, seed=5),
    View(6, 56, 56, sampling="stride", stride=3, interpolation="area"),
    View(8, 48, 48, window=(0.5, 1)),
]


@pytest.mark.parametrize(
    "codec, pix_fmt, suffix",
    [
        ("utvideo", "gbrp", "avi"),
        ("ffv1", "bgr0", "mkv"),
        ("rawvideo", "rgb24", "nut"),
        ("png", "rgb24", "avi"),
    ],
)
@pytest.mark.parametrize("size", [(48, 80), (90, 62)])
def test_a_clip_of_frames_is_that_of_their_lossless_video(tmp_path, codec, pix_fmt, suffix, size):
    frames = textured(21, *size)
    path = write_video(tmp_path / f"v.{suffix}", list(frames), codec, pix_fmt=pix_fmt)
    for view in VIEWS:
        clip = clip_of_frames(frames, view, "v")
        assert clip.dtype == np.uint8 and clip.shape == (view.frames, view.size, view.size, 3)
        np.testing.assert_array_equal(clip, read_clip(path, view))


def test_frames_may_be_few_and_anywhere_in_memory():
    frames = textured(5, 40, 60)
    view = View(8, 32, 32)
    numbers = [int((i + 0.5) * 5 / 8) for i in range(8)]
    clip = clip_of_frames(frames, view)
    assert all(
        np.array_equal(clip[i], clip_of_frames(frames[n : n + 1], View(1, 32, 32))[0])
        for i, n in enumerate(numbers)
    )
    flipped = np.asfortranarray(frames)[::-1, :, ::-1]
    np.testing.assert_array_equal(
        clip_of_frames(flipped, view), clip_of_frames(np.ascontiguousarray(flipped), view)
    )
    np.testing.assert_array_equal(clip_of_frames(list(frames), view), clip)
    same = textured(4, 32, 32)
    np.testing.assert_array_equal(clip_of_frames(same, View(4, 32, 32)), same)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 32, 32, 3)),
        np.zeros((4, 3, 32, 32), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
)
def test_what_is_no_array_of_frames_is_refused(frames):
    with pytest.raises(
        InputError,
        match=re.escape(f"{list(frames.shape)} was given; clip_of_frames takes frames uint8"),
    ):
        clip_of_frames(frames)


# -------------------------------------------------------------------------------- encode


def test_encode_takes_arrays_and_tensors_with_a_batch_axis_or_without():
    encoder = tiny_encoder(View(4, 32, 32))
    clips = clips_for(encoder.config)
    expected = encoder(encoder.normalise(ops.patchify(clips, 8))).detach()
    readonly = clips.numpy().copy()
    readonly.setflags(write=False)
    planes = np.ascontiguousarray(clips.numpy().transpose(0, 1, 4, 2, 3)).transpose(
        0, 1, 3, 4, 2
    )  # as read_clip lays them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (
            clips,
            clips.numpy(),
            readonly,
            planes,
            clips.numpy()[:, ::-1][:, ::-1],
            ops.patchify(clips, 8),
            ops.patchify(clips.numpy(), 8),
        ):
            assert torch.equal(encoder.encode(given), expected)
            torch.testing.assert_close(encoder.encode(given[1]), expected[1], rtol=1e-4, atol=1e-5)
            assert encoder.encode(given[1]).shape == expected[1].shape
        backwards = encoder.encode(clips.numpy()[:, ::-1])
    torch.testing.assert_close(backwards, encoder.encode(clips.flip(1)))


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-5)]
)
def test_encode_computes_in_the_dtype_of_the_weights(dtype, limit):
    encoder = tiny_encoder(View(4, 32, 32))
    clips = clips_for(encoder.config)
    expected = encoder.encode(clips)
    assert expected.dtype == torch.float32
    found = encoder.to(dtype).encode(clips)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < limit * expected.norm()
    assert encoder.encode(clips, grad=True).requires_grad


def test_encode_keeps_a_graph_only_where_it_is_asked_to():
    encoder = tiny_encoder(View(4, 32, 32))
    clips = clips_for(encoder.config)
    assert not encoder.encode(clips).requires_grad
    encoder.encode(clips, grad=True).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    with torch.no_grad():
        assert not encoder.encode(clips, grad=True).requires_grad


@pytest.mark.parametrize(
    "clip, message",
    [
        (
            np.zeros((8, 224, 224, 3), np.uint8),
            (
                "8 frames of 224x224 were given; this encoder takes 16 of 112x112: "
                "video.read_clip(path, encoder.view) cuts them"
            ),
        ),
        (np.zeros((2, 16, 240, 320, 3), np.uint8), "16 frames of 320x240 were given"),
        (
            torch.zeros(16, 112, 112, 3),
            "torch.float32 [16, 112, 112, 3] was given; encode takes uint8",
        ),
        (np.zeros((16, 112, 112, 3)), "float64 [16, 112, 112, 3] was given; encode takes uint8"),
        (np.zeros((16, 3, 112, 112), np.uint8), "an array [16, 3, 112, 112] was given"),
        (np.zeros((112, 112, 3), np.uint8), "an array [112, 112, 3] was given"),
        (np.zeros((9, 384), np.uint8), "or their patches [1568, 384]"),
        (np.zeros(7, np.uint8), "an array [7] was given"),
    ],
)
def test_encode_names_what_was_given(clip, message):
    with torch.device("meta"):
        encoder = tiny_encoder(View(16, 112, 112))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        encoder.encode(clip)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------- the view, and the exported folder


def test_the_view_comes_with_the_encoder(tmp_path):
    view = View(8, 48, 56, sampling="stride", stride=3, interpolation="bicubic", window=(0.25, 1))
    encoder = tiny_encoder(view, eps=1e-5, mean=(0.4, 0.5, 0.6))
    save(encoder, tmp_path / "best.pth")
    encoders.export_transformers(
        encoders.load_encoder(tmp_path / "best.pth"), tmp_path / "exported"
    )
    for path in ("best.pth", "exported"):
        for load in (encoders.load_encoder, teachers.load_teacher):
            found = load(tmp_path / path)
            assert found.view == view and found.config == encoder.config, (path, load)
            assert found.state_dict().keys() == encoder.state_dict().keys()
            assert all(
                torch.equal(value, encoder.state_dict()[name])
                for name, value in found.state_dict().items()
            )
            assert not found.training
    assert teachers.load_teacher(tmp_path / "exported").sha256 == sha256(
        tmp_path / "exported" / "model.safetensors"
    )
    with pytest.raises(InputError, match="holds no moving average"):
        encoders.load_encoder(tmp_path / "exported", ema=True)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    (tmp_path / "exported" / "config.json").write_text(
        json.dumps({**config, "salt_view": {"colour": 3}})
    )
    with pytest.raises(InputError, match="no field 'colour'"):
        encoders.load_encoder(tmp_path / "exported")


def test_a_teacher_of_others_has_the_view_of_its_size(tmp_path):
    encoder = tiny_encoder(View(8, 48, 56))
    encoders.export_transformers(encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["salt_view"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert teachers.load_teacher(tmp_path).view == View(8, 48, 48)


@pytest.mark.parametrize(
    "view",
    [
        View(8, 112, 112),
        View(16, 224, 224),
        View(4, 48, 64, interpolation="bicubic"),
        View(6, 56, 56, crop="squash"),
        View(4, 40, 48, sampling="stride", interpolation="area"),
    ],
    ids=lambda view: f"{view.frames}x{view.size}",
)
def test_the_exported_folder_does_what_the_encoder_does_from_a_video_file_on(tmp_path, view):
    path = write_video(tmp_path / "v.webm", list(textured(20, 120, 176)), bit_rate=4_000_000)
    encoder = tiny_encoder(view, mean=(0.4, 0.5, 0.6), std=(0.3, 0.25, 0.2))
    encoders.export_transformers(encoder, tmp_path / "exported")
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "exported").eval()
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "exported")
    clip = read_clip(path, encoder.view)
    pixels = processor(list(clip), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, view.frames, 3, view.size, view.size)
    with torch.no_grad():
        found = theirs(pixels).last_hidden_state[0]
    expected = encoder.encode(clip)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    whole = processor(list(textured(view.frames, 120, 176)), return_tensors="pt")["pixel_values"]
    assert theirs(whole).last_hidden_state.shape == (1, *expected.shape)  # frames of any size run


def test_the_view_outlives_saving_by_transformers(tmp_path):
    view = View(4, 32, 40)
    encoders.export_transformers(tiny_encoder(view), tmp_path / "ours")
    transformers.VideoMAEModel.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    assert encoders.load_encoder(tmp_path / "theirs").view == view


# -------------------------------------------------------------------------------- README


def test_the_lines_of_readme_run(tmp_path, monkeypatch):
    """README's part 6 as it stands, on a checkpoint of another shape than the default."""
    block = re.search(
        r"\*\*6\. Use it\.\*\*\s+```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    view = View(6, 40, 48)
    (tmp_path / "checkpoints" / "RUN").mkdir(parents=True)
    save(tiny_encoder(view), tmp_path / "checkpoints" / "RUN" / "best.pth")
    write_video(tmp_path / "video.webm", list(textured(20, 60, 80)), bit_rate=4_000_000)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block[1], str(README), "exec"), names)
    assert names["clip"].shape == (6, 40, 40, 3) and names["features"].shape == (75, 48)
    answers = [tokens for tokens in names["tokens"] if tokens is not None]
    assert len(answers) == 20 and answers[0].shape == (25, 48)
