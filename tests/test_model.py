"""Encoders against `transformers`, loading and saving, the loss and R2 against plain formulas."""

import argparse
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from model import EncoderConfig
from salt import cache_format, encoders, ops, optimiser, ranks, teachers, views
from salt.checkpoint import CHECKPOINT_PARTS, load_checkpoint, save_checkpoint
from salt.errors import InputError
from salt.loader import Batch
from salt.masks import sample_masks
from salt.positions import turn
from salt.score import Space, clip_errors, mse, r2, r2_interval

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
TINY = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    image_size=32,
    num_frames=4,
    decoder_hidden_size=24,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=1,
    decoder_intermediate_size=48,
)


def clips_for(config, count=2):
    return torch.randint(
        0,
        256,
        (count, config.frames, config.size, config.size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def pixel_values(clips, mean=views.IMAGENET_MEAN, std=views.IMAGENET_STD):
    return ((clips.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 1, 4, 2, 3)


def shake(network):
    """Random values in every parameter, biases and norms too: zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return network.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {
            "hidden_size": 768,
            "num_hidden_layers": 3,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "image_size": 224,
            "num_frames": 16,
            "use_mean_pooling": False,
        },
        {"qkv_bias": False, "use_mean_pooling": False},
        {
            "hidden_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "intermediate_size": 200,
            "num_frames": 6,
            "image_size": 48,
            "patch_size": 8,
        },
    ],
    ids=["as wide as base", "no qkv bias", "odd shape, no final norm"],
)
def test_load_teacher_matches_transformers(tmp_path, changes):
    theirs = shake(transformers.VideoMAEModel(transformers.VideoMAEConfig(**{**TINY, **changes})))
    theirs.save_pretrained(tmp_path)
    ours = teachers.load_teacher(tmp_path)
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training
    assert ours.config.qkv_bias == theirs.config.qv_bias and ours.config.eps == 1e-12
    clips = clips_for(ours.config, 1)
    with torch.no_grad():
        expected = theirs(pixel_values(clips)).last_hidden_state
        torch.testing.assert_close(ours.encode(clips), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["VideoMAEForPreTraining", "VideoMAEForVideoClassification"])
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_pretraining_and_fine_tuned_folders(tmp_path, kind, mean_pooling):
    theirs = shake(
        getattr(transformers, kind)(
            transformers.VideoMAEConfig(**TINY, use_mean_pooling=mean_pooling)
        )
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    ours = teachers.load_teacher(tmp_path)
    clips = clips_for(ours.config)
    with torch.no_grad():
        expected = theirs.videomae(
            pixel_values(clips, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        ).last_hidden_state
        torch.testing.assert_close(ours.encode(clips), expected, rtol=1e-4, atol=1e-4)


def test_older_folders_hold_bin_files_and_biases_under_query(tmp_path):
    theirs = shake(
        transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY, use_mean_pooling=False))
    )
    theirs.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save(
        {f"videomae.{name}": value for name, value in theirs.state_dict().items()},
        tmp_path / "pytorch_model.bin",
    )
    assert any(name.endswith("query.bias") for name in theirs.state_dict())
    ours = teachers.load_teacher(tmp_path)
    clips = clips_for(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode(clips), theirs(pixel_values(clips)).last_hidden_state, rtol=1e-4, atol=1e-4
        )


def as_original(encoder):
    """An encoder's weights under the names of the original VideoMAE code."""
    c, out = encoder.config, {}
    for name, value in encoder.state_dict().items():
        if name.startswith("patch_embed"):
            out[name.replace("patch_embed", "patch_embed.proj")] = (
                value.view(c.dim, 3, c.tubelet, c.patch, c.patch)
                if name.endswith("weight")
                else value
            )
        else:
            out[name.replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")] = value
    return out


@pytest.mark.parametrize("layout", ["bare", "encoder", "model", "module"])
def test_original_videomae_files(tmp_path, layout):
    mine = shake(
        model.Encoder(EncoderConfig(dim=128, depth=2, heads=2, mlp_dim=256, frames=4, size=32))
    )
    named = as_original(mine)
    arguments = argparse.Namespace(num_frames=4, input_size=32, model="pretrain_videomae_odd")
    saved = {
        "bare": {**named, "args": arguments},
        "encoder": {
            "model": {
                **{f"encoder.{name}": value for name, value in named.items()},
                "decoder.norm.weight": torch.ones(3),
                "mask_token": torch.zeros(1),
            },
            "args": arguments,
            "epoch": 3,
        },
        "model": {"model": {**named, "head.weight": torch.zeros(5, 128)}, "args": arguments},
        "module": {"module": named, "args": vars(arguments)},
    }[layout]
    torch.save(saved, tmp_path / "videomae.pth")
    ours = teachers.load_teacher(tmp_path / "videomae.pth")
    assert ours.config == mine.config
    clips = clips_for(mine.config)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(clips), mine.encode(clips))


def test_fine_tuned_original_files_have_no_final_norm(tmp_path):
    mine = shake(
        model.Encoder(
            EncoderConfig(dim=64, depth=1, heads=1, mlp_dim=128, final_norm=False, qkv_bias=False)
        )
    )
    torch.save(
        {"module": {**as_original(mine), "fc_norm.weight": torch.ones(64)}}, tmp_path / "x.pth"
    )
    # 16 frames of 224 where no arguments are stored
    assert teachers.load_teacher(tmp_path / "x.pth").config == mine.config


def test_heads_of_original_files_come_from_the_named_sizes(tmp_path, monkeypatch):
    """Huge and giant have 16 heads, not width / 64; a small stand-in for them, since the real ones
    are gigabytes.
    """
    monkeypatch.setitem(model.SIZES, "stand-in", (128, 1, 8, 16, 512))
    mine = shake(model.Encoder(EncoderConfig(dim=128, depth=1, heads=8, mlp_dim=512)))
    torch.save(as_original(mine), tmp_path / "x.pth")
    assert teachers.load_teacher(tmp_path / "x.pth").config.heads == 8
    assert [model.SIZES[name][2] for name in ("huge", "giant")] == [16, 16]


def test_a_student_exports_to_transformers(tmp_path):
    for final_norm in (True, False):
        mine = shake(
            model.Encoder(
                EncoderConfig(
                    dim=48, depth=2, heads=4, mlp_dim=96, frames=4, size=32, final_norm=final_norm
                )
            )
        )
        encoders.export_transformers(mine, tmp_path / str(final_norm))
        theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / str(final_norm)).eval()
        clips = clips_for(mine.config)
        with torch.no_grad():
            torch.testing.assert_close(
                theirs(pixel_values(clips)).last_hidden_state,
                mine.encode(clips),
                rtol=1e-4,
                atol=1e-4,
            )
            torch.testing.assert_close(
                teachers.load_teacher(tmp_path / str(final_norm)).encode(clips), mine.encode(clips)
            )


@pytest.mark.parametrize(
    "name, inside",
    [
        ("video_preprocessor_config.json", None),
        ("processor_config.json", "video_processor"),
        ("processor_config.json", "image_processor"),
    ],
)
def test_mean_and_std_of_every_kind_of_processor(tmp_path, name, inside):
    transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY)).save_pretrained(tmp_path)
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": None}
    (tmp_path / name).write_text(json.dumps({inside: pixels} if inside else pixels))
    config = teachers.load_teacher(tmp_path).config
    assert (list(config.mean), list(config.std)) == (pixels["image_mean"], pixels["image_std"])


@pytest.mark.parametrize(
    "pixels, expected",
    [
        ({}, {}),
        (
            {
                "size": {"shortest_edge": 40},
                "crop_size": {"height": 32, "width": 32},
                "resample": 3,
            },
            {"short_side": 40, "interpolation": "bicubic"},
        ),
        ({"size": 32, "crop_size": 32}, {"interpolation": "bilinear"}),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, {"crop": "squash"}),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}, {}),
        ({"size": 32, "crop_size": 32, "resample": 0}, {}),
    ],
)
def test_a_folders_processor_says_how_clips_are_cut(tmp_path, pixels, expected):
    """As far as a View can; what is cut otherwise is cut as by default."""
    transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    encoder = teachers.load_teacher(tmp_path)
    assert (
        encoder.view
        == dataclasses.replace(views.View(frames=4, size=32, short_side=32), **expected)
        and not encoder.view_is_known
    )


def test_a_folder_that_does_not_normalise(tmp_path):
    theirs = shake(transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY)))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.2] * 3})
    )
    ours = teachers.load_teacher(tmp_path)
    clips = clips_for(ours.config)
    with torch.no_grad():
        expected = theirs(pixel_values(clips, (0, 0, 0), (1, 1, 1))).last_hidden_state
        torch.testing.assert_close(ours.encode(clips), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 1}, {"num_attention_heads": 1}, {"layer_norm_eps": 1e-3}]
)
def test_the_same_weights_in_another_shape_are_another_teacher(tmp_path, change):
    theirs = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**{**TINY, "num_hidden_layers": 2})
    )
    theirs.save_pretrained(tmp_path)
    before = teachers.load_teacher(tmp_path).identity
    assert cache_format.agree_on(
        json.loads(json.dumps(before)), teachers.load_teacher(tmp_path).identity
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    after = teachers.load_teacher(tmp_path).identity
    assert before["sha256"] == after["sha256"] and not cache_format.agree_on(before, after)


def test_bad_teachers_are_one_clear_error(tmp_path):
    theirs = transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY))
    theirs.save_pretrained(tmp_path / "good")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    for name, change in (
        ("vit", {"model_type": "vit"}),
        ("deep", {"num_hidden_layers": 5}),
        ("wide", {"intermediate_size": 128}),
        ("relu", {"hidden_act": "relu"}),
        ("text", {"num_hidden_layers": "1"}),
        ("headless", {"num_attention_heads": 0}),
        ("oblong", {"image_size": [96, 128]}),
    ):
        theirs.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
    for name, pixels in (
        ("grey", {"image_mean": [0.5]}),
        ("flat", {"image_std": [0, 0, 0]}),
        ("null", {"image_mean": None}),
        ("unscaled", {"do_rescale": False}),
        ("doubled", {"rescale_factor": 1 / 127.5}),
    ):
        theirs.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(pixels))
    torch.save(
        {
            "salt_vla": 1,
            **dict.fromkeys(CHECKPOINT_PARTS),
            "student": {},
            "encoder_config": {"width": 3},
        },
        tmp_path / "odd.pth",
    )
    (tmp_path / "empty").mkdir()
    theirs.save_pretrained(tmp_path / "cut")
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    torch.save({"salt_vla": 1}, tmp_path / "bare.pth")
    theirs.save_pretrained(tmp_path / "listed")
    (tmp_path / "listed" / "config.json").write_text("[]")
    (tmp_path / "noise.pth").write_bytes(b"\x80\x04nonsense")
    torch.save([1, 2], tmp_path / "list.pth")
    mine = model.Encoder(EncoderConfig(dim=64, depth=1, heads=1, mlp_dim=128, frames=4, size=32))
    torch.save(
        {"model": {**as_original(mine), "pos_embed": torch.zeros(1, 8, 64)}},
        tmp_path / "learned.pth",
    )
    theirs.save_pretrained(tmp_path / "learned")
    os.remove(tmp_path / "learned" / "model.safetensors")
    torch.save(
        {**theirs.state_dict(), "embeddings.position_embeddings": torch.zeros(1, 8, 64)},
        tmp_path / "learned" / "pytorch_model.bin",
    )
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    for name, message in (
        ("vit", "cannot open"),
        ("deep", "lacks the weight"),
        ("wide", "shape"),
        ("relu", "hidden_act"),
        ("empty", "no config.json"),
        ("cut", "damaged"),
        ("noise.pth", "noise.pth"),
        ("list.pth", "holds list"),
        ("resnet.pth", "patch_embed"),
        ("nowhere", "no teacher"),
        ("bare.pth", "lacks student"),
        ("text", "malformed"),
        ("headless", "heads"),
        ("oblong", "square"),
        ("grey", "three numbers"),
        ("flat", "above 0"),
        ("null", "malformed"),
        ("odd.pth", "malformed"),
        ("listed", "no JSON object"),
        ("unscaled", "otherwise than by 1/255"),
        ("doubled", "otherwise than by 1/255"),
        ("learned.pth", "encoder lacks; its positions are sines"),
        ("learned", "encoder lacks; its positions are sines"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            teachers.load_teacher(tmp_path / name)
        assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb_went_off",))


def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"salt_vla": 1, "student": Bomb()}, "bad.pth")
    for load in (teachers.load_teacher, encoders.load_encoder):
        with pytest.raises(InputError, match="could run code"):
            load("bad.pth")
    assert not os.path.exists("bomb_went_off")


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    save_checkpoint(
        tmp_path / "x.pth",
        {**dict.fromkeys(CHECKPOINT_PARTS), "student": {"w": torch.arange(10000.0)}},
    )
    load_checkpoint(tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path / "x.pth")


# -------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize(
    "name, dim, depth, heads, millions",
    [
        ("tiny", 192, 12, 3, 5.6),
        ("small", 384, 12, 6, 21.9),
        ("base", 768, 12, 12, 86.2),
        ("large", 1024, 24, 16, 303.9),
        ("huge", 1280, 32, 16, 631.7),
        ("giant", 1408, 40, 16, 1012.2),
    ],
)
def test_sizes(name, dim, depth, heads, millions):
    with torch.device("meta"):
        config = model.config_of_size(name)
        encoder = torch.nn.ModuleList([model.Block(config.dim, config.heads, config.mlp_dim)] * 1)
    block = sum(parameter.numel() for parameter in encoder.parameters())
    total = config.depth * block + (config.patch_dim + 1) * config.dim + 2 * config.dim
    assert (config.dim, config.depth, config.heads) == (dim, depth, heads)
    assert total / 1e6 == pytest.approx(millions, abs=0.6)


def test_only_the_tokens_given_are_seen():
    """Encoding a subset is encoding a clip of those tokens: other patches change nothing, order
    follows the index.
    """
    encoder = shake(
        model.Encoder(EncoderConfig(dim=48, depth=2, heads=4, mlp_dim=96, frames=4, size=32))
    )
    patches = torch.randn(2, 8, 1536)
    index = torch.tensor([[1, 4, 6], [0, 2, 7]])
    picked = ops.masked_gather(patches, index)
    out = encoder(picked, index)
    torch.testing.assert_close(
        encoder(picked.flip(1), index.flip(1)), out.flip(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(encoder(patches), encoder(patches, torch.arange(8).expand(2, 8)))


def test_encode_refuses_other_clips():
    encoder = model.Encoder(EncoderConfig(dim=48, depth=1, heads=4, mlp_dim=96, frames=4, size=32))
    for clips in (
        torch.zeros(1, 4, 32, 48, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 32, 32, 3),
        torch.zeros(1, 9, 1536, dtype=torch.uint8),
    ):
        with pytest.raises(InputError, match="was given|were given"):
            encoder.encode(clips)
    clips = clips_for(encoder.config)
    torch.testing.assert_close(encoder.encode(clips), encoder.encode(ops.patchify(clips)))


def make_salt(target_dim=20, families=("short", "long"), seen=False, **predictor):
    torch.manual_seed(0)
    config = EncoderConfig(dim=48, depth=1, heads=4, mlp_dim=96, frames=8, size=96)
    return shake(
        model.build_salt(
            config,
            {
                "dim_in": 48,
                "dim_out": target_dim,
                "tokens": config.tokens,
                "families": list(families),
                "dim": 32,
                "depth": 1,
                "heads": 4,
                "seen": seen,
                "grid": config.grid,
                **predictor,
            },
        )
    )


@pytest.mark.parametrize(
    "target, normalise, kind",
    [
        ("latents", "none", "mse"),
        ("latents", "layer_norm", "smooth_l1"),
        ("latents", "standardise", "l1"),
        ("pixels", "none", "mse"),
    ],
)
def test_loss_and_r2_match_their_formulas(target, normalise, kind):
    salt = make_salt(1536 if target == "pixels" else 20)
    patches = torch.randint(0, 256, (3, 144, 1536), dtype=torch.uint8)
    latents = torch.randn(3, 144, 20).half()
    mean, rstd = torch.randn(144, 20), torch.rand(144, 20) + 0.5
    space = Space(
        target, normalise, mean, rstd, torch.randn(144, 1536 if target == "pixels" else 20) * 0.1
    )
    masks = [sample_masks(torch.arange(3), 0, 0, family, (4, 6, 6)) for family in ("short", "long")]
    batch = Batch(torch.arange(3), patches, latents, masks)
    predictions = salt(patches, masks)
    weighted, (loss, squared, spread) = model.salt_loss(
        lambda *_: predictions, batch, space, kind, weight=0.25
    )
    gradients = torch.autograd.grad(weighted, list(predictions.values()), retain_graph=True)

    if target == "pixels":
        x = patches.double() / 255
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    elif normalise == "layer_norm":
        y = latents.double()
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    else:
        y = (latents.double() - mean) * rstd if normalise == "standardise" else latents.double()
    errors = []
    squares = []
    spreads = []
    for drawn in masks:
        wanted = torch.stack([y[b, drawn.target[b]] for b in range(3)])
        difference = predictions[drawn.family].double() - wanted
        error = {
            "mse": difference**2,
            "l1": difference.abs(),
            "smooth_l1": torch.where(
                difference.abs() < 1, difference**2 / 2, difference.abs() - 0.5
            ),
        }[kind]
        errors.append(error.mean() / 2), squares.append((difference**2).sum())
        spreads.append(
            (wanted - torch.stack([space.zero[drawn.target[b]] for b in range(3)])).pow(2).sum()
        )
    for got, parts in ((loss, errors), (squared, squares), (spread, spreads)):
        torch.testing.assert_close(
            got.double(), sum(parts), rtol=1e-4, atol=1e-6, check_dtype=False
        )
    assert weighted.item() == pytest.approx(loss.item() / 4, rel=1e-5)
    plain = torch.autograd.grad(sum(errors) / 4, list(predictions.values()), retain_graph=True)
    for gradient, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)

    found = clip_errors(salt, space, batch)
    expected = 1 - sum(squares) / sum(spreads)
    if kind == "mse":
        assert mse(found.values()) == pytest.approx(loss.item(), rel=1e-4)
    assert r2(found.values()) == pytest.approx(expected.item(), rel=1e-4)
    drawn = masks[0]
    background = (
        torch.stack(
            [y[b, drawn.context[b]].mean(0, keepdim=True) - y[b, drawn.target[b]] for b in range(3)]
        )
        .pow(2)
        .sum((1, 2))
    )
    np.testing.assert_allclose(found["short"]["background"], background.numpy(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_the_loss_at_the_context_matches_its_formula(kind):
    salt, plain = make_salt(seen=True), make_salt()
    plain.load_state_dict(salt.state_dict(), strict=False)
    patches = torch.randint(0, 256, (3, 144, 1536), dtype=torch.uint8)
    latents = torch.randn(3, 144, 20).half()
    space = Space("latents", "layer_norm", None, None, torch.randn(144, 20) * 0.1)
    masks = [sample_masks(torch.arange(3), 0, 0, family, (4, 6, 6)) for family in ("short", "long")]
    batch = Batch(torch.arange(3), patches, latents, masks)
    total, sums = model.salt_loss(salt, batch, space, kind, weight=0.5, context=0.25)
    without, others = model.salt_loss(plain, batch, space, kind, weight=0.5)
    torch.testing.assert_close(sums[:3], others)

    features = torch.cat(
        [salt.student(salt.student.normalise(patches, m.context), m.context) for m in masks], dim=1
    )
    said = F.linear(features, salt.predictor.seen.weight, salt.predictor.seen.bias)
    index = torch.cat([drawn.context for drawn in masks], dim=1)
    y = F.layer_norm(latents.float(), (20,), eps=1e-6)
    wanted, mean = (torch.stack([x[b][index[b]] for b in range(3)]) for x in (y, [space.zero] * 3))
    error = F.mse_loss(said, wanted) if kind == "mse" else F.smooth_l1_loss(said, wanted)
    torch.testing.assert_close(total, without + 0.5 * 0.25 * error)
    squares = torch.stack([(said - wanted).square().sum(), (mean - wanted).square().sum()])
    torch.testing.assert_close(sums[3:], squares, rtol=1e-4, atol=0)
    total.backward()
    (gradient,) = torch.autograd.grad(0.125 * error, [salt.predictor.seen.weight])
    torch.testing.assert_close(salt.predictor.seen.weight.grad, gradient)


def test_r2_is_zero_for_the_mean_and_one_for_truth():
    rows = {"squared": np.array([1.0, 3.0]), "spread": np.array([1.0, 3.0])}
    assert r2([rows]) == 0 and r2([{**rows, "squared": np.zeros(2)}]) == 1
    rising = {"squared": np.linspace(0, 1, 50), "spread": np.ones(50)}
    low, high = r2_interval([rising], np.arange(50))
    assert low < 0.5 < high and high - low < 0.25


def test_gradients_reach_every_parameter():
    salt = make_salt()
    masks = [sample_masks(torch.arange(2), 0, 0, family, (4, 6, 6)) for family in ("short", "long")]
    patches = torch.randint(0, 256, (2, 144, 1536), dtype=torch.uint8)
    batch = Batch(torch.arange(2), patches, torch.randn(2, 144, 20), masks)
    loss, _ = model.salt_loss(
        salt, batch, Space("latents", "none", None, None, torch.zeros(144, 20))
    )
    loss.backward()
    still = [
        name
        for name, parameter in salt.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert still == []


@pytest.mark.parametrize("positions", ["table", "rope"])
def test_targets_that_look_at_the_context_alone(positions):
    """Against plain PyTorch, in float64; who else is asked for changes nothing, and every parameter
    has a gradient.
    """
    salt = make_salt(attends="context", positions=positions)
    predictor = salt.predictor
    ids = torch.arange(2)
    masks = [sample_masks(ids, 0, 0, family, (4, 6, 6)) for family in ("short", "long")]
    context = torch.randn(2, sum(drawn.context.shape[1] for drawn in masks), 48)
    found = predictor(context, masks)
    first = 0
    for number, drawn in enumerate(masks):
        count = drawn.context.shape[1]
        seen = predictor.embed(context[:, first : first + count])
        first += count
        asked = predictor.mask_tokens[number].expand(*drawn.target.shape, -1)
        seen = predictor.position.added_to(seen, drawn.context)
        asked = predictor.position.added_to(asked, drawn.target)
        (block,) = predictor.blocks
        attn, given = block.attn, block.norm1(seen)
        q, k, v = (
            (of @ attn.qkv.weight[32 * i : 32 * (i + 1)].T + bias).unflatten(-1, (1, 4, 8))
            for i, (of, bias) in enumerate(
                [(block.norm1(asked), attn.q_bias), (given, 0), (given, attn.v_bias)]
            )
        )
        if positions == "rope":
            q = turn(q, predictor.position.turned_by(drawn.target))
            k = turn(k, predictor.position.turned_by(drawn.context))
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :, 0], k[:, :, 0]) / 8**0.5
        looked = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, 0]).flatten(-2)
        asked = asked + attn.proj(looked)
        asked = asked + block.fc2(F.gelu(block.fc1(block.norm2(asked))))
        expected = predictor.proj(predictor.norm(asked))
        torch.testing.assert_close(found[drawn.family], expected, rtol=1e-4, atol=1e-5)
    fewer = [drawn._replace(target=drawn.target[:, :3].contiguous()) for drawn in masks]
    for family, prediction in predictor(context, fewer).items():
        torch.testing.assert_close(prediction, found[family][:, :3], rtol=1e-4, atol=1e-5)
    sum(prediction.square().sum() for prediction in found.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in predictor.parameters())


def test_weight_decay_falls_on_matrices_alone():
    salt = make_salt()
    decayed, plain = optimiser.parameter_groups(salt, 0.1)
    names = {id(parameter): name for name, parameter in salt.named_parameters()}
    assert (
        all(parameter.dim() == 2 for parameter in decayed["params"]) and plain["weight_decay"] == 0
    )
    assert {names[id(parameter)] for parameter in plain["params"] if parameter.dim() > 1} == {
        "predictor.mask_tokens"
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_vicreg_penalties():
    torch.manual_seed(0)
    spread = torch.randn(40, 100, 6)
    variance, covariance = model.vicreg(spread * 2)
    assert variance == 0 and covariance < 0.05
    variance, covariance = model.vicreg(spread[..., :1].expand(40, 100, 6) * 3)
    assert variance == 0 and covariance == pytest.approx(81 * 5, rel=0.1)
    assert model.vicreg(torch.ones(4, 5, 6))[0] == pytest.approx(0.99, abs=0.001)


def test_checkpoints_come_back(tmp_path):
    salt = make_salt()
    config = salt.student.config
    space = Space("latents", "none", None, None, torch.randn(144, 20))
    predictor_config = {
        "dim_in": 48,
        "dim_out": 20,
        "tokens": 144,
        "families": ["short", "long"],
        "dim": 32,
        "depth": 1,
        "heads": 4,
    }
    save_checkpoint(
        tmp_path / "best.pth",
        {
            "student": salt.student.state_dict(),
            "predictor": salt.predictor.state_dict(),
            "encoder_config": model.plain(config),
            "predictor_config": predictor_config,
            "space": model.plain(space),
            "settings": {},
            "view": {},
            "identity": {},
            "teacher": None,
            "step": 0,
        },
    )
    loaded, found, _ = encoders.load_salt(tmp_path / "best.pth")
    for name, value in salt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(found.zero, space.zero) and os.listdir(tmp_path) == ["best.pth"]
    encoder = encoders.load_encoder(tmp_path / "best.pth")
    teacher = teachers.load_teacher(tmp_path / "best.pth")
    clips = clips_for(config)
    with torch.no_grad():
        assert torch.equal(encoder.encode(clips), salt.student.encode(clips)) and torch.equal(
            teacher.encode(clips), encoder.encode(clips)
        )


def test_devices_that_are_not_there():
    assert ranks.pick_device("cpu").type == "cpu"
    for name in ("gpu", "mps", "meta"):
        with pytest.raises(InputError, match="it takes auto"):
            ranks.pick_device(name)
    with pytest.raises(InputError, match="sees"):
        ranks.pick_device("cuda:99")


def test_a_teacher_never_computes_in_tf32():
    """Whatever train.py sets for the student; and what it set is what it finds again."""
    seen = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    teacher = type(
        "Teacher",
        (),
        {"encode": lambda self, clips: seen.append(torch.get_float32_matmul_precision()) or clips},
    )()
    try:
        assert teachers.teacher_latents(teacher, 3) == 3
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "high")
    finally:
        torch.set_float32_matmul_precision(before)
