"""Streams: what is given out never changes, and is what attention that looks back alone makes of
the whole past; windows encoded anew; frames, batches, other shapes, pooled features.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import model
from model import EncoderConfig
from salt import ops
from salt.errors import InputError
from salt.positions import turned
from salt.stream import StreamingEncoder, leak
from salt.video import clip_of_frames
from tests.test_model import shake


def encoder_of(kind, **changes):
    torch.manual_seed(0)
    shape = dict(dim=48, depth=2, heads=4, mlp_dim=96, frames=8, size=32, positions=kind)
    encoder = shake(model.Encoder(EncoderConfig(**{**shape, **changes})))
    with torch.no_grad():
        for block in encoder.blocks:  # else attention hardly looks anywhere
            block.attn.qkv.weight *= 4
    return encoder


def stream_of(count, size=(32, 32), seed=0):
    shape = (count, *size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def pushed(stream, frames):
    """[features of each answer]."""
    answers = [stream.push(frame) for frame in frames]
    every = stream.hop
    assert all((x is not None) == (i % every == every - 1) for i, x in enumerate(answers))
    return [x for x in answers if x is not None]


def by_masks(encoder, frames, tubelets):
    """Every tubelet's features, computed together in plain PyTorch: a tubelet's queries look at the
    keys of its own and of those up to `tubelets` - 1 before, each at its place in that window.
    """
    c = encoder.config
    n = c.grid[1] * c.grid[2]
    patches = ops.patchify(torch.from_numpy(frames)[None], c.patch, c.tubelet)
    count = patches.shape[1] // n
    x = encoder.patch_embed(encoder.normalise(patches))
    places = [min(k, tubelets - 1) for k in range(count)]
    for block in encoder.blocks:
        qkv = block.attn.queries_keys_values(block.norm1(x))
        rows = []
        for k, place in enumerate(places):
            first = (k - place) * n
            window = turned(
                qkv[:, first : (k + 1) * n],
                encoder.position.turned_by(torch.arange((place + 1) * n)[None]),
            )
            q, key, value = (window[:, :, part].transpose(1, 2) for part in range(3))
            scores = q[:, :, -n:] @ key.mT / q.shape[-1] ** 0.5
            rows.append(rearrange(scores.softmax(-1) @ value, "b h n d -> b n (h d)"))
        x = x + block.attn.proj(torch.cat(rows, dim=1))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    return encoder.norm(x).unflatten(1, (count, n))[0]


@pytest.mark.parametrize("hop, window", [(2, 8), (4, 8), (2, 4)])
def test_features_of_the_past_alone(hop, window):
    """Also once the window has moved on, which it does after `window` frames of 16."""
    encoder, frames = encoder_of("rope"), stream_of(16)
    answers = pushed(StreamingEncoder(encoder, window=window, hop=hop), frames)
    with torch.no_grad():
        expected = by_masks(encoder, frames, window // 2)
    found = torch.cat(answers).unflatten(0, (8, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_later_frame_changes_no_feature_of_the_past(causal):
    """Within one answer, of four tubelets: of what looks ahead all of them change."""
    encoder, frames = encoder_of("rope"), stream_of(8)
    other = frames.copy()
    other[-1] = 255 - other[-1]
    streams = (StreamingEncoder(encoder, hop=8, causal=causal) for _ in range(2))
    first, second = (
        pushed(stream, x)[0].unflatten(0, (4, -1))
        for stream, x in zip(streams, (frames, other), strict=True)
    )
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert same == [causal] * 3 + [False]


def test_what_a_stream_looks_at_depends_on_when_it_was():
    """Two tubelets of the past in the other order, beyond the first window, too."""
    encoder, frames = encoder_of("rope", depth=1), stream_of(12)
    swapped = frames[[0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]]
    first, second = (pushed(StreamingEncoder(encoder), x)[-1] for x in (frames, swapped))
    assert (first - second).norm() > 0.01 * first.norm()


@pytest.mark.parametrize("kind", ["table", "table3d"])
def test_a_table_streams_by_whole_windows_alone(kind):
    assert not StreamingEncoder(encoder_of(kind)).causal
    assert StreamingEncoder(encoder_of("rope")).causal
    with pytest.raises(InputError, match="cannot move on in a table"):
        StreamingEncoder(encoder_of(kind), causal=True)


def test_as_many_cameras_as_before():
    stream = StreamingEncoder(encoder_of("rope"))
    stream.push(stream_of(1))
    with pytest.raises(InputError, match="2 frames at a time were pushed, and 1 before"):
        stream.push(stream_of(2))


def test_what_a_whole_clip_owes_to_later_frames():
    encoder, clip = encoder_of("rope"), stream_of(8)
    found = leak(encoder, clip)
    assert len(found) == 3 and min(found) > 0.01
    still = np.repeat(clip[:1], 8, axis=0)
    assert leak(encoder, still) == [0, 0, 0]
    whole = encoder.encode(clip, pool="time")
    other = encoder.encode(np.concatenate([clip[:4], clip[3:4].repeat(4, 0)]), pool="time")
    assert found[1] == pytest.approx(float((other - whole)[1].norm() / whole[1].norm()))


def test_windows_encoded_anew():
    encoder, frames = encoder_of("table"), stream_of(12)
    answers = pushed(StreamingEncoder(encoder, causal=False), frames)
    for number, answer in enumerate(answers):
        last = 2 * number + 2
        clip = frames[max(0, last - 8) : last]
        clip = np.concatenate([clip[:1].repeat(8 - len(clip), 0), clip])
        assert torch.equal(answer, encoder.encode(clip, pool="time")[-1])
    with pytest.raises(InputError, match="positions are a table"):
        StreamingEncoder(encoder, window=4, causal=False)
    small = StreamingEncoder(encoder_of("rope"), window=4, causal=False)
    assert len(pushed(small, frames)) == 6


def test_the_first_tubelet_of_a_stream_is_a_clip_of_its_own():
    encoder, frames = encoder_of("rope"), stream_of(2)
    (answer,) = pushed(StreamingEncoder(encoder), frames)
    torch.testing.assert_close(answer, encoder.at(frames=2).encode(frames), rtol=1e-5, atol=1e-5)


def test_batches_sizes_and_new_episodes():
    encoder = encoder_of("rope")
    cameras = [stream_of(8, (40, 56), seed) for seed in (1, 2)]
    stream = StreamingEncoder(encoder)
    together = pushed(stream, np.stack(cameras, axis=1))
    for i, frames in enumerate(cameras):
        stream.reset()
        alone = pushed(stream, frames)
        cut = clip_of_frames(frames, dataclasses.replace(encoder.view, frames=8))
        stream.reset()
        of_cut = pushed(stream, cut)
        for a, b, c in zip(together, alone, of_cut, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)
            assert torch.equal(b, c)


def test_in_bfloat16():
    frames = stream_of(8)
    exact = pushed(StreamingEncoder(encoder_of("rope")), frames)
    rounded = pushed(StreamingEncoder(encoder_of("rope").bfloat16()), frames)
    assert rounded[0].dtype == torch.bfloat16
    for a, b in zip(exact, rounded, strict=True):  # these weights are large
        assert (a - b.float()).norm() < 0.1 * a.norm()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"window": 7}, "window is 7"),
        ({"window": 16}, "no more than the encoder's 8"),
        ({"hop": 3}, "hop is 3"),
        ({"window": 4, "hop": 8}, "no more than the window's 4"),
    ],
)
def test_windows_that_do_not_fit(flags, message):
    with pytest.raises(InputError, match=message):
        StreamingEncoder(encoder_of("rope"), **flags)


# ---- one call each: tokens by time, and one vector; other shapes
def test_pooled_features():
    encoder, clips = (
        encoder_of("table"),
        torch.from_numpy(np.stack([stream_of(8), stream_of(8, seed=1)])),
    )
    tokens = encoder.encode(clips)
    assert torch.equal(encoder.encode(clips, pool="time"), tokens.reshape(2, 4, 4, 48))
    assert torch.equal(encoder.encode(clips, pool="mean"), tokens.mean(1))
    assert encoder.encode(clips[0], pool="mean").shape == (48,)
    with pytest.raises(InputError, match="pool is None, 'time' or 'mean', not 'max'"):
        encoder.encode(clips, pool="max")


@pytest.mark.parametrize("kind", ["table", "table3d"])
def test_an_interpolated_table(kind):
    encoder = encoder_of(kind)
    with pytest.raises(InputError, match="positions are a table"):
        encoder.at(size=48)
    larger = encoder.at(size=48, interpolated=True)
    assert larger.config.grid == (4, 3, 3) and larger.encode(stream_of(8, (48, 48))).shape == (
        36,
        48,
    )
    old, new = (e.position.table.reshape(*e.config.grid, 48) for e in (encoder, larger))
    torch.testing.assert_close(new[:, 1, 1], old.mean((1, 2)))  # its middle is theirs
    torch.testing.assert_close(new[:, 0, 0], old[:, 0, 0])  # with nothing beyond the corner
    assert encoder.config.grid == (4, 2, 2) and encoder.position.table.shape == (16, 48)
    again = larger.at(size=32, interpolated=True)
    assert again.position.table.shape == (16, 48)


def test_one_frame_and_few():
    """They stand for those that are not there, as ever: the first of them for the first half."""
    encoder, frames = encoder_of("rope"), stream_of(3)
    clip = clip_of_frames(frames, encoder.view)
    assert encoder.encode(clip).shape == (16, 48)
    still = clip_of_frames(frames[:1], encoder.view)
    assert np.array_equal(still, frames[:1].repeat(8, 0))
    one = encoder.at(frames=2).encode(clip_of_frames(frames[:1], encoder.at(frames=2).view))
    assert one.shape == (4, 48)
