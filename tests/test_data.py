"""Lists, views and decoding, against arithmetic done by hand and against frames whose content says which they are."""
import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from config import InputError
from data import View


def write_video(path, frames, codec="libvpx-vp9", rate=12, pix_fmt="yuv420p", times=None, options=None, **context):
    """Encode uint8 RGB frames, or ready VideoFrames, at `times` (frame numbers by default)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        first = frames[0]
        stream.height, stream.width = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        stream.codec_context.time_base = Fraction(1, rate)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for i, frame in enumerate(frames):
            frame = frame if isinstance(frame, av.VideoFrame) else av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = (i if times is None else times[i]), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def numbered_frames(count, size=(48, 64)):
    """Grey frames, frame i of brightness 4 i + 10: what came out says which frame it was."""
    return [np.full((*size, 3), 4 * i + 10, np.uint8) for i in range(count)]


def numbers_in(clip):
    return np.rint((clip.reshape(len(clip), -1).mean(1) - 10) / 4).astype(int).tolist()


SMALL = View(frames=8, size=32, short_side=32)


@pytest.mark.parametrize("codec, suffix", [("libvpx-vp9", "webm"), ("libx264", "mp4"), ("mpeg4", "avi"), ("ffv1", "mkv")])
@pytest.mark.parametrize("count", [40, 13, 3, 1])
def test_uniform_takes_the_frames_of_the_formula(tmp_path, codec, suffix, count):
    path = write_video(tmp_path / f"v.{suffix}", numbered_frames(count), codec, bit_rate=8_000_000)
    clip = data.read_clip(path, SMALL)
    assert clip.shape == (8, 32, 32, 3) and clip.dtype == np.uint8
    assert numbers_in(clip) == [int((i + 0.5) * count / 8) for i in range(8)]


def test_a_variable_frame_rate_counts_frames_not_seconds(tmp_path):
    times = np.cumsum([1, 1, 5, 1, 9, 1, 1, 30, 1, 2] * 2).tolist()
    path = write_video(tmp_path / "v.webm", numbered_frames(20), times=times)
    assert numbers_in(data.read_clip(path, SMALL)) == [int((i + 0.5) * 20 / 8) for i in range(8)]


def test_webm_states_no_frame_count(tmp_path):
    path = write_video(tmp_path / "v.webm", numbered_frames(10))
    with av.open(path) as container:
        assert container.streams.video[0].frames == 0
        assert data.count_frames(container, container.streams.video[0]) == 10


def test_stride_and_window(tmp_path):
    path = write_video(tmp_path / "v.mkv", numbered_frames(41), "ffv1", pix_fmt="yuv444p")
    assert numbers_in(data.read_clip(path, View(frames=8, size=32, short_side=32, sampling="stride", stride=4))) == list(range(6, 38, 4))
    assert numbers_in(data.read_clip(path, View(frames=8, size=32, short_side=32, sampling="stride", stride=9))) == [0, 0, 6, 15, 24, 33, 40, 40]
    half = data.read_clip(path, View(frames=8, size=32, short_side=32, window=(0.5, 1)))
    assert numbers_in(half) == [20 + int((i + 0.5) * 21 / 8) for i in range(8)]


def test_jittered_views_repeat_and_differ(tmp_path):
    rng = np.random.default_rng(0)
    path = write_video(tmp_path / "v.mkv", [rng.integers(0, 256, (48, 96, 3), dtype=np.uint8) for _ in range(30)], "ffv1", pix_fmt="bgr0")
    views = [View(frames=8, size=32, short_side=40, view=v) for v in (0, 1, 1, 2)]
    clips = [data.read_clip(path, view, "some id") for view in views]
    assert np.array_equal(clips[1], clips[2])
    assert not np.array_equal(clips[0], clips[1]) and not np.array_equal(clips[1], clips[3])
    assert not np.array_equal(clips[1], data.read_clip(path, views[1], "another id"))
    for seed in range(50):  # jittered frames stay in their segments
        random = data.ops.Random(seed, 0, 1, data.ops.STREAMS["view"])
        picked = data.frame_numbers(30, views[1], random)
        assert all(int(i * 30 / 8) <= p <= (i + 1) * 30 / 8 for i, p in enumerate(picked))


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_is_honoured(tmp_path, turn):
    """Patches the display matrix of an mp4 track header, as phones write it (ISO 14496-12: x' = a x + c y, y' = b x + d y)."""
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:32, :32, 0] = 255  # red in the top left
    path = tmp_path / "v.mp4"
    write_video(path, [frame] * 4, "mpeg4", options={"qscale": "2"})
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of fields
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]  # clockwise
    content[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    clip = data.read_clip(str(path), View(frames=2, size=64, short_side=64))
    expected = np.rot90(frame, -turn // 90)
    assert np.abs(clip[0].astype(int) - expected).mean() < 12
    assert np.abs(clip[0].astype(int) - np.rot90(frame, -turn // 90 + 1)).mean() > 30


YUV = {  # (matrix, range, bits) -> the luma weights of red and blue, and how codes map to [0, 1]
    "601": (0.299, 0.114), "709": (0.2126, 0.0722)}


@pytest.mark.parametrize("matrix", ["601", "709"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("bits", [8, 10])
def test_colour_matrix_range_and_depth(tmp_path, matrix, full, bits):
    """Constant YUV codes against the equations of BT.601 / BT.709."""
    codes = np.array([(120, 90, 170), (60, 160, 110), (200, 128, 128), (180, 100, 140)]) * 2 ** (bits - 8)
    frames = []
    for y, u, v in codes:
        frame = av.VideoFrame(32, 32, "yuv444p" if bits == 8 else "yuv444p10le")
        for plane, value in zip(frame.planes, (y, u, v)):
            plane.update(np.full(plane.buffer_size // (1 if bits == 8 else 2), value, np.uint8 if bits == 8 else "<u2").tobytes())
        frame.colorspace = 1 if matrix == "709" else 6
        frame.color_range = 2 if full else 1
        frames.append(frame)
    path = write_video(tmp_path / "v.mkv", frames, "ffv1", pix_fmt=frames[0].format.name, color_range=2 if full else 1, colorspace=1 if matrix == "709" else 6)
    clip = data.read_clip(path, View(frames=4, size=32, short_side=32))
    kr, kb = YUV[matrix]
    unit = codes / 2 ** (bits - 8)
    luma = unit[:, 0] / 255 if full else (unit[:, 0] - 16) / 219
    blue, red = ((unit[:, i] - 128) / (255 if full else 224) for i in (1, 2))
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    expected = np.clip(np.stack([r, g, b], 1) * 255, 0, 255)
    assert np.abs(clip[:, 16, 16] - expected).max() <= 2.5, (clip[:, 16, 16], expected)


def test_resize_and_crop_match_an_independent_resize(tmp_path):
    y, x = np.mgrid[0:120, 0:200]
    frame = np.stack([x * 255 / 199, y * 255 / 119, 128 + 100 * np.sin(x / 20) * np.cos(y / 17)], -1).astype(np.uint8)
    path = write_video(tmp_path / "v.mkv", [frame] * 2, "ffv1", pix_fmt="bgr0")
    clip = data.read_clip(path, View(frames=2, size=48, short_side=60))
    image = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    resized = F.interpolate(image, (60, 100), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(clip[0] - resized[6:54, 26:74]).mean() < 1.5
    squashed = data.read_clip(path, View(frames=2, size=48, short_side=48, crop="squash"))
    expected = F.interpolate(image, (48, 48), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(squashed[0] - expected).mean() < 1.5


def test_broken_videos_are_one_clear_error(tmp_path, monkeypatch):
    good = write_video(tmp_path / "good.webm", numbered_frames(24))
    content = open(good, "rb").read()
    (tmp_path / "empty.webm").write_bytes(b"")
    (tmp_path / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "head.webm").write_bytes(content[:200])
    with av.open(str(tmp_path / "sound.webm"), "w") as container:
        stream = container.add_stream("libopus", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    for name in ("empty", "noise", "head", "sound", "missing"):
        with pytest.raises(data.VideoError, match=f"{name}.webm"):
            data.read_clip(str(tmp_path / f"{name}.webm"), SMALL)
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)  # frames this large for real would not fit a test
    with pytest.raises(data.VideoError, match="64x48, more than 1000 pixels"):
        data.read_clip(good, SMALL)


def test_a_truncated_video_gives_the_frames_it_has(tmp_path):
    rng = np.random.default_rng(0)
    noisy = [np.clip(frame + rng.integers(-8, 8, frame.shape), 0, 255).astype(np.uint8) for frame in numbered_frames(40)]
    content = open(write_video(tmp_path / "v.webm", noisy), "rb").read()
    cut = tmp_path / "cut.webm"
    cut.write_bytes(content[:len(content) // 2])
    numbers = numbers_in(data.read_clip(str(cut), SMALL))
    assert numbers == sorted(numbers) and 10 < numbers[-1] < 30


# -------------------------------------------------------------------------------------------------------------- patches

def test_patches_are_ordered_as_a_conv3d_flattens():
    clip = np.random.default_rng(0).integers(0, 256, (4, 64, 48, 3), dtype=np.uint8)
    patches = data.patchify(clip)
    assert patches.shape == (2 * 4 * 3, 3 * 2 * 16 * 16)
    conv = torch.nn.Conv3d(3, 5, (2, 16, 16), (2, 16, 16))
    expected = conv(torch.from_numpy(clip).float().permute(3, 0, 1, 2)[None]).flatten(2).transpose(1, 2)[0]
    got = F.linear(torch.from_numpy(patches).float(), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)
    assert np.array_equal(data.unpatchify(patches, (2, 4, 3)), clip)
    batch = torch.from_numpy(np.stack([clip, clip]))
    assert torch.equal(data.unpatchify(data.patchify(batch), (2, 4, 3)), batch)


def test_default_view_gives_1568_tokens():
    assert data.grid_of(View(), 16) == (8, 14, 14)
    assert data.patchify(np.zeros((16, 224, 224, 3), np.uint8)).shape == (1568, 1536)
    with pytest.raises(InputError, match="do not divide"):
        data.grid_of(View(), 15)


def test_views_hash_and_compare():
    assert View() == View.from_dict(json.loads(json.dumps(View().to_dict())))
    assert View().hash() != View(size=112, short_side=112).hash()
    assert "size is 224 here and 96 there" in View().difference(View(size=96))
    for fields, message in (({"sampling": "random"}, "sampling"), ({"frames": 0}, "frames"), ({"window": (0.5, 0.5)}, "window"), ({"size": 300}, "short_side")):
        with pytest.raises(InputError, match=message):
            View(**fields)
    with pytest.raises(InputError, match="no field 'sise'; did you mean size"):
        View.from_dict({"sise": 3})


def test_random_halves_are_halves_anywhere():
    windows = [data.random_half(str(i), 0) for i in range(500)]
    assert all(abs(end - start - 0.5) < 1e-12 and 0 <= start <= 0.5 for start, end in windows)
    assert 0.2 < np.mean([start for start, _ in windows]) < 0.3 and windows[3] == data.random_half("3", 0)


# ---------------------------------------------------------------------------------------------------------------- lists

def make_folder(tmp_path, names, sub=""):
    (tmp_path / sub).mkdir(exist_ok=True, parents=True)
    for name in names:
        (tmp_path / sub / name).write_bytes(b"x")


@pytest.mark.parametrize("list_name", ["train.json", "something-something-v2-train.json", "labels/train.json"])
@pytest.mark.parametrize("sub", ["", "videos", "20bn-something-something-v2"])
def test_ssv2_layouts(tmp_path, list_name, sub):
    make_folder(tmp_path, ["1.webm", "2.mp4", "9.txt"], sub)
    (tmp_path / "labels").mkdir()
    (tmp_path / list_name).write_text(json.dumps([{"id": "1", "label": "pushing a cup", "template": "Pushing [something]"}, {"id": 2}, {"id": "3"}]))
    said = []
    rows = data.load_split(str(tmp_path), "train", log=said.append)
    assert [row.id for row in rows] == ["1", "2", "3"] and rows[0].label == "Pushing something"
    assert rows[0].path.endswith("1.webm") and rows[1].path.endswith("2.mp4") and rows[2].path is None
    assert list_name in said[0]


def test_lists_are_looked_for_in_splits_dir(tmp_path):
    make_folder(tmp_path / "videos", ["1.webm"])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "validation.json").write_text('[{"id": "1"}]')
    rows = data.load_split(str(tmp_path / "videos"), "validation", str(tmp_path / "lists"))
    assert rows[0].path and rows[0].label is None


def test_a_folder_without_lists_splits_by_hash(tmp_path):
    make_folder(tmp_path, [f"clip{i}.mp4" for i in range(300)])
    train, held_out = (data.load_split(str(tmp_path), split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 300 and 15 < len(held_out) < 50
    assert not {row.id for row in train} & {row.id for row in held_out}
    make_folder(tmp_path, ["a\tb.webm"], "odd")
    with pytest.raises(InputError, match="no plain file name"):
        data.load_split(str(tmp_path / "odd"), "train")
    make_folder(tmp_path, ["a.webm"], "validation")
    assert [row.id for row in data.load_split(str(tmp_path), "validation")] == ["a"]


def test_csv_lists(tmp_path):
    make_folder(tmp_path, ["a.mp4", "b.webm"], "in")
    (tmp_path / "train.csv").write_text("\ufeffpath,label\nin/a.mp4,grasp\nin/b.webm\n")
    rows = data.load_split(str(tmp_path), "train")
    assert [(row.id, row.label) for row in rows] == [("in/a", "grasp"), ("in/b", None)] and rows[1].path
    both = [data.load_split(str(tmp_path / "train.csv"), split) for split in ("train",)]
    assert {row.id for row in both[0]} <= {"in/a", "in/b"}


@pytest.mark.parametrize("content, message", [
    ('{"moving [something]": "0"}', "label table"), ('[{"label": "x"}]', "row 0"), ('[{"id": "1"}, {"id": "../../etc/passwd"}]', "row 1: the id"),
    ('[{"id": "a/b"}]', "plain file name"), ("[{", "not a readable JSON"), ("[" * 200000, "not a readable JSON"), ("[]", "is empty"), ('[{"id": "1"}, {"id": 1}]', "twice"),
    ('[{"id": "7"}]', "none of the 1 videos"), ('[{"id": true}]', "row 0"), ('[{"id": "1", "label": 3}]', "label 3")])
def test_malformed_lists_are_one_clear_error(tmp_path, content, message):
    make_folder(tmp_path, ["1.webm"])
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        data.load_split(str(tmp_path), "train")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_lists_and_folders(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        data.load_split(str(tmp_path / "nowhere"), "train")
    make_folder(tmp_path, ["1.webm"])
    (tmp_path / "train.json").write_text('[{"id": "1"}]')
    with pytest.raises(InputError, match="no list for the split 'test'"):
        data.load_split(str(tmp_path), "test")
    with pytest.raises(InputError, match="is a list; --data names the folder"):
        data.load_split(str(tmp_path / "train.json"), "train")
    make_folder(tmp_path / "few", ["a.mp4"])
    with pytest.raises(InputError, match="too few"):
        [data.load_split(str(tmp_path / "few"), split) for split in ("train", "validation")]
    (tmp_path / "bad.csv").write_text("../outside.mp4\n")
    with pytest.raises(InputError, match="row 0"):
        data.load_split(str(tmp_path / "bad.csv"), "train")


# -------------------------------------------------------------------------------------------------------------- batches

def fake_reader(bad=()):
    def read(i):
        if i in bad:
            raise data.VideoError(f"video {i} is broken")
        return data.Sample(i, np.full((2, 3), i, np.uint8), None)
    return read


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_keep_their_order_and_places(threads):
    order = data.shuffled(22, 3, 1)
    got = [batch.ids.tolist() for batch in data.batches(fake_reader(), order, 4, threads, substitutes=22)]
    assert got == [order[i:i + 4] for i in range(0, 20, 4)]
    assert order == data.shuffled(22, 3, 1) != data.shuffled(22, 3, 2) and sorted(order) == list(range(22))


def test_a_broken_video_costs_only_its_own_place():
    """In training the next readable sample stands in, whatever batch it is; in evaluation the batch is smaller."""
    heard = []
    listen = lambda i, error: heard.append((i, str(error)))
    got = [batch.ids.tolist() for batch in data.batches(fake_reader({1, 5, 6}), [0, 1, 2, 3, 4, 5, 6, 7], 4, failed=listen, substitutes=8)]
    assert got == [[0, 2, 2, 3], [4, 7, 7, 7]] and heard == [(i, f"video {i} is broken") for i in (1, 5, 6)]
    assert [batch.ids.tolist() for batch in data.batches(fake_reader({7}), [7, 2], 1, failed=listen, substitutes=8)] == [[0], [2]]
    got = [batch.ids.tolist() for batch in data.batches(fake_reader({1, 4, 5, 6}), range(7), 4, failed=listen)]
    assert got == [[0, 2, 3]]
    with pytest.raises(InputError, match="16 videos in a row could not be decoded; the first: video 3"):
        list(data.batches(fake_reader(range(30)), [3], 1, failed=listen, substitutes=30))
    with pytest.raises(data.VideoError, match="video 1"):
        list(data.batches(fake_reader({1}), range(4), 2))
    with pytest.raises(InputError, match="fewer than a batch"):
        data.check_batch(3, 4)
    assert [len(batch.ids) for batch in data.batches(fake_reader(), range(7), 4)] == [4, 3]


def test_a_failing_disk_is_not_the_videos_fault(tmp_path, monkeypatch):
    path = tmp_path / "v.webm"
    path.write_bytes(b"noise")
    with pytest.raises(data.VideoError):
        data.read_clip(str(path), SMALL)

    def failing(*arguments, **others):
        raise OSError(5, "Input/output error", str(path))
    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        data.read_clip(str(path), SMALL)
    assert not isinstance(caught.value, InputError)
