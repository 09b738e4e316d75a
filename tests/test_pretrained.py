"""Teachers as they come: V-JEPA 2 and other models of `transformers`, what layers and norm of them
are asked for, grids of students that are not theirs, and names on the hub.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from model import EncoderConfig
from salt import cache, cache_format, caching, encoders, hub, ops, teachers, views
from salt.errors import InputError
from salt.splits import load_split
from salt.teachers import Asked, load_teacher
from salt.video import read_row
from tests.stages import ROOT, SMALL, error_of, run
from tests.test_model import TINY, clips_for, pixel_values, shake

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
SMALL_V_JEPA = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    crop_size=32,
    frames_per_clip=4,
    pred_hidden_size=24,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
)


def v_jepa(**changes):
    config = transformers.VJEPA2Config(**{**SMALL_V_JEPA, **changes})
    return shake(transformers.VJEPA2Model(config))


def theirs_of(net, clips):
    with torch.no_grad():
        return net(pixel_values(clips), skip_predictor=True).last_hidden_state


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 88, "num_attention_heads": 2, "mlp_ratio": 48 / 11, "crop_size": 48},
        {"qkv_bias": False, "patch_size": 8, "frames_per_clip": 6, "layer_norm_eps": 1e-5},
    ],
    ids=["small", "giant's ratio", "no biases"],
)
def test_v_jepa_2_matches_transformers(tmp_path, changes):
    theirs = v_jepa(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_teacher(tmp_path)
    assert ours.config.positions == "rope" and ours.config.mean == views.IMAGENET_MEAN
    assert ours.config.key_bias == theirs.config.qkv_bias
    clips = clips_for(ours.config)
    torch.testing.assert_close(ours.encode(clips), theirs_of(theirs, clips), rtol=1e-4, atol=1e-4)


def test_v_jepa_2_at_another_shape(tmp_path):
    """Ours counts places by the clip; theirs by its configuration, which has to be the clip's."""
    sharp = v_jepa()
    for layer in sharp.encoder.layer:  # else attention hardly looks at places
        layer.attention.query.weight.data *= 30
    sharp.save_pretrained(tmp_path / "small")
    ours = load_teacher(tmp_path / "small", asked=Asked(8, 64))
    assert (ours.view.frames, ours.view.size) == (8, 64)
    clips = clips_for(ours.config)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    theirs = transformers.VJEPA2Model.from_pretrained(tmp_path / "small").eval()
    wrong = theirs_of(theirs, clips)
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "crop_size": 64}))
    theirs = transformers.VJEPA2Model.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(ours.encode(clips), theirs_of(theirs, clips), rtol=1e-4, atol=1e-4)
    assert (ours.encode(clips) - wrong).abs().max() > 1e-2  # without a word


def original_of(net):
    """The state of a VJEPA2Model's encoder under the names of V-JEPA's own code."""
    state = {}
    for name, tensor in net.encoder.state_dict().items():
        name = name.replace("embeddings.patch_embeddings", "patch_embed").replace(
            "layernorm", "norm"
        )
        name = name.replace("layer.", "blocks.", 1).replace(".attention.", ".attn.")
        state[f"module.backbone.{name}"] = tensor
    for i in range(net.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            names = [
                f"module.backbone.blocks.{i}.attn.{x}.{kind}" for x in ("query", "key", "value")
            ]
            whole = torch.cat([state.pop(name) for name in names])
            state[f"module.backbone.blocks.{i}.attn.qkv.{kind}"] = whole
    return state


def test_original_files_of_v_jepa_2(tmp_path):
    theirs = v_jepa(hidden_size=128, num_attention_heads=2)  # 64 a head, which it does not state
    state, other = original_of(theirs), original_of(v_jepa(hidden_size=128))
    table = {"module.backbone.pos_embed": torch.zeros(1, 2048, 128)}
    content = {"encoder": {name: 0 * x for name, x in other.items()}, "epoch": 3, "predictor": {}}
    torch.save({**content, "target_encoder": {**state, **table}}, tmp_path / "vitl.pt")
    ours = load_teacher(tmp_path / "vitl.pt", asked=Asked(4, 32))
    clips = clips_for(ours.config)
    torch.testing.assert_close(ours.encode(clips), theirs_of(theirs, clips), rtol=1e-4, atol=1e-4)
    shape = load_teacher(tmp_path / "vitl.pt").config
    assert (shape.frames, shape.size, shape.heads, shape.key_bias) == (64, 256, 2, True)

    first = {"module.backbone.pos_embed": torch.zeros(1, 1568, 128)}
    torch.save({**content, "target_encoder": {**state, **first}}, tmp_path / "first.pth.tar")
    more = {"module.backbone.norms_block.0.weight": torch.zeros(128)}
    torch.save({**content, "ema_encoder": {**state, **more}}, tmp_path / "later.pt")
    for name, message in (("first.pth.tar", "V-JEPA's first version"), ("later.pt", "norms_block")):
        with pytest.raises(InputError, match=message):
            load_teacher(tmp_path / name)


@pytest.mark.parametrize("classify", [False, True])
def test_a_student_with_rotary_positions_exports_to_v_jepa_2(tmp_path, classify):
    shape = dict(dim=48, depth=2, heads=4, mlp_dim=128, frames=4, size=32, positions="rope")
    mine = shake(model.Encoder(EncoderConfig(**shape, mean=(0.5,) * 3, std=(0.25,) * 3)))
    mine.view = views.View(4, 32, 40, sampling="stride", stride=3)
    encoders.export_transformers(mine, tmp_path / "v")
    again = encoders.load_encoder(tmp_path / "v")
    assert again.config == mine.config and again.view == mine.view and again.view_is_known
    clips = clips_for(mine.config)
    assert torch.equal(again.encode(clips), mine.encode(clips))
    kind = transformers.VJEPA2ForVideoClassification if classify else transformers.AutoModel
    theirs, told = kind.from_pretrained(tmp_path / "v", output_loading_info=True)
    heads = ("pooler.", "classifier.") if classify else ()
    assert (
        all(name.startswith(heads) for name in told["missing_keys"]) and not told["unexpected_keys"]
    )
    found = theirs.vjepa2 if classify else theirs
    pixels = pixel_values(clips, mine.config.mean, mine.config.std)
    with torch.no_grad():
        latents = found.eval()(pixels, skip_predictor=True).last_hidden_state
        assert torch.equal(found(pixels).last_hidden_state, latents)  # its predictor is there
    torch.testing.assert_close(latents, mine.encode(clips), rtol=1e-5, atol=1e-5)
    if classify:
        before = theirs(pixels, labels=torch.tensor([0, 1])).loss
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            theirs(pixels, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
        assert theirs(pixels, labels=torch.tensor([0, 1])).loss < 0.5 * before


def test_a_table_of_three_axes_is_neither(tmp_path):
    shape = dict(dim=48, depth=1, heads=4, mlp_dim=96, frames=4, size=32, positions="table3d")
    with pytest.raises(InputError, match="VideoMAE has a table .* V-JEPA 2 rotary .* neither"):
        encoders.export_transformers(model.Encoder(EncoderConfig(**shape)), tmp_path / "v")
    with pytest.raises(InputError, match="takes no clips of 8 of 32"):
        model.Encoder(EncoderConfig(**shape)).at(frames=8)


# ---- other models of transformers
IMAGES = {
    "vit": transformers.ViTConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "dinov3_vit": transformers.DINOv3ViTConfig,
    "siglip_vision_model": transformers.SiglipVisionConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
}
BESIDE = {
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "clip_vision_model": 1,
}
OF_PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def image_model(kind, folder, patch=16, **more):
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    registers = {"num_register_tokens": 4} if BESIDE.get(kind) == 5 else {}
    config = IMAGES[kind](image_size=2 * patch, patch_size=patch, **sizes, **registers, **more)
    net = shake(transformers.AutoModel.from_config(config))
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(OF_PIXELS))
    return net


def expected_of(net, kind, teacher, clips, layer=-1):
    """By hand: frame by frame, without the tokens that are no patches, two frames a tubelet."""
    frames = pixel_values(clips, OF_PIXELS["image_mean"], OF_PIXELS["image_std"]).flatten(0, 1)
    with torch.no_grad():
        made = net(pixel_values=frames)
    tokens = made.last_hidden_state
    if layer != -1:  # what that block gives, caught on its way
        caught = []
        lists = (x for x in net.modules() if isinstance(x, torch.nn.ModuleList))
        layers = next(x for x in lists if len(x) == 3)
        hook = layers[layer].register_forward_hook(lambda block, given, out: caught.append(out))
        with torch.no_grad():
            net(pixel_values=frames)
        hook.remove()
        out = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        tokens = F.layer_norm(out, (48,))
    tokens = tokens[:, BESIDE.get(kind, 0) :]  # [B * T, n, D]
    return tokens.reshape(len(clips), -1, 2, tokens.shape[1], 48)  # [B, T / 2, 2, n, D]


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("kind", IMAGES)
def test_image_models_frame_by_frame(tmp_path, kind, patch):
    net = image_model(kind, tmp_path, patch)
    teacher = load_teacher(tmp_path, asked=Asked(frames=4))
    c = teacher.config
    assert (c.frames, c.size, c.patch, c.tubelet, c.dim) == (4, 2 * patch, patch, 2, 48)
    clips = clips_for(c)
    expected = expected_of(net, kind, teacher, clips)
    found = teacher.encode(clips)
    torch.testing.assert_close(found, expected.mean(2).flatten(1, 2), rtol=1e-4, atol=1e-4)
    last = load_teacher(tmp_path, asked=Asked(frames=4, of_frames="last"))
    torch.testing.assert_close(
        last.encode(clips), expected[:, :, -1].flatten(1, 2), rtol=1e-4, atol=1e-4
    )
    assert teacher.identity["of_frames"] == "mean" and last.identity["of_frames"] == "last"
    several = load_teacher(tmp_path, asked=Asked(frames=4, layers=(-2, -1)))
    before = expected_of(net, kind, teacher, clips, -2)
    both = torch.cat([before, expected], -1).mean(2).flatten(1, 2)
    torch.testing.assert_close(several.encode(clips), both, rtol=1e-4, atol=1e-4)
    assert several.config.dim == 96 and several.identity["layers"] == [-2, -1]


@pytest.mark.parametrize(
    "kind", ["vit", "dinov2", "dinov3_vit", "siglip_vision_model", "clip_vision_model"]
)
def test_an_image_model_at_another_resolution(tmp_path, kind):
    net = image_model(kind, tmp_path)
    teacher = load_teacher(tmp_path, asked=Asked(4, 64))
    clips = clips_for(teacher.config)
    assert teacher.config.grid == (2, 4, 4)
    frames = pixel_values(clips, *OF_PIXELS.values()).flatten(0, 1)
    how = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = net(pixel_values=frames, **how).last_hidden_state[:, BESIDE.get(kind, 0) :]
    expected = expected.reshape(2, 2, 2, 16, 48).mean(2).flatten(1, 2)
    torch.testing.assert_close(teacher.encode(clips), expected, rtol=1e-4, atol=1e-4)


def test_a_video_model_of_tubelets(tmp_path):
    config = transformers.VivitConfig(
        image_size=32, num_frames=4, tubelet_size=[2, 16, 16], hidden_size=48,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    )  # fmt: skip
    net = shake(transformers.VivitModel(config))
    net.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not say how pixels are normalised"):
        load_teacher(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OF_PIXELS))
    teacher = load_teacher(tmp_path)
    with pytest.raises(InputError, match="of videos of 4 frames; leave --frames"):
        load_teacher(tmp_path, asked=Asked(frames=8))
    clips = clips_for(teacher.config)
    with torch.no_grad():
        pixels = pixel_values(clips, *OF_PIXELS.values())
        expected = net(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher.encode(clips), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "pixels, expected",
    [
        ({"size": {"height": 32, "width": 32}, "resample": 3}, ("squash", 32, "bicubic")),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
          "do_center_crop": True, "resample": 3}, ("center", 40, "bicubic")),
        ({}, ("center", 32, "bilinear")),
        ({"size": {"height": 32, "width": 32}, "crop_size": None, "do_center_crop": None,
          "do_rescale": None, "resample": 3}, ("squash", 32, "bicubic")),
        ({"size": 32, "resample": 3}, ("squash", 32, "bicubic")),
    ],
)  # fmt: skip
def test_frames_are_cut_as_its_processor_cuts_them(tmp_path, pixels, expected):
    image_model("dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**OF_PIXELS, **pixels}))
    view = load_teacher(tmp_path).view
    assert (view.crop, view.short_side, view.interpolation) == expected
    assert view.size == 32 and view.frames == 16


def test_what_transformers_would_pass_over_is_refused(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    image_model("dinov2", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "layer.1" not in k}, file, {"format": "pt"})
    with pytest.raises(InputError, match="lacks .* weights of a dinov2"):  # they would be random
        load_teacher(tmp_path)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match="has 3 blocks"):
        load_teacher(tmp_path, asked=Asked(layers=(-4,)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timesformer"}))
    with pytest.raises(InputError, match="no tubelets in order"):
        load_teacher(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        load_teacher(tmp_path)


def test_what_is_no_transformer_of_patches_is_refused(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OF_PIXELS))
    with pytest.raises(InputError, match="holds a resnet, which is no transformer of patches"):
        load_teacher(tmp_path)


def test_a_cut_that_no_view_can_say_is_said(world, tmp_path):
    image_model("vit", tmp_path / "t")
    odd = {"size": {"longest_edge": 40}, "do_center_crop": True}
    odd |= {"crop_size": {"height": 24, "width": 32}}
    (tmp_path / "t" / "preprocessor_config.json").write_text(json.dumps({**OF_PIXELS, **odd}))
    flags = ["--teacher", "t", "--data", world / "data", "--frames", 4, "--limit", 2]
    said = run(tmp_path, "cache_latents", *flags, "--resolution", 32, "--out", "c")
    assert "cuts frames in a way that no view can say" in said


def test_a_tubelet_of_a_video_model_is_no_choice(tmp_path):
    v_jepa().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is for models of images"):
        load_teacher(tmp_path, asked=Asked(of_frames="last"))


# ---- layers and norm of our own
@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_layers_side_by_side(tmp_path, kind):
    if kind == "vjepa2":
        theirs = v_jepa()
        ask = functools.partial(theirs, skip_predictor=True, output_hidden_states=True)
    else:
        config = transformers.VideoMAEConfig(**TINY, use_mean_pooling=False)
        theirs = shake(transformers.VideoMAEModel(config))
        ask = functools.partial(theirs, output_hidden_states=True)
    theirs.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, asked=Asked(layers=(-1, -2)))
    clips = clips_for(teacher.config)
    with torch.no_grad():
        made = ask(pixel_values(clips))
    expected = [made.last_hidden_state, F.layer_norm(made.hidden_states[-2], (48,))]
    found = teacher.encode(clips)
    torch.testing.assert_close(found, torch.cat(expected, -1), rtol=1e-4, atol=1e-4)
    plain = load_teacher(tmp_path)
    assert not teachers.agree_on(plain.identity, teacher.identity)
    older = {k: v for k, v in plain.identity.items() if k not in Asked().to_dict()}
    assert teachers.agree_on(older, plain.identity) and teachers.agree_on(plain.identity, older)
    assert Asked().to_dict() | {"shown": None} == cache_format.ASKED
    for asked in (Asked(layers=(-2,)), Asked(norm=True)):  # of the same width
        other = load_teacher(tmp_path, asked=asked).identity
        assert not teachers.agree_on(older, other) and not teachers.agree_on(other, older)
    with pytest.raises(InputError, match="the first -"):
        load_teacher(tmp_path, asked=Asked(layers=(-9,)))


def test_the_norm_that_a_mean_pooled_videomae_lacks(tmp_path):
    theirs = shake(transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY)))
    theirs.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, asked=Asked(norm=True))
    clips = clips_for(teacher.config)
    with torch.no_grad():
        raw = theirs(pixel_values(clips)).last_hidden_state
    torch.testing.assert_close(
        teacher.encode(clips), F.layer_norm(raw, (48,)), rtol=1e-4, atol=1e-4
    )


def test_a_mean_pooled_videomae_is_said_to_have_no_norm(world, tmp_path):
    config = transformers.VideoMAEConfig(**{**TINY, "image_size": 48})
    transformers.VideoMAEModel(config).save_pretrained(tmp_path / "t")
    flags = ["--teacher", "t", "--data", world / "data", "--limit", 2]
    assert "has no final norm" in run(tmp_path, "cache_latents", *flags, "--out", "raw")
    said = run(tmp_path, "cache_latents", *flags, "--out", "normed", "--teacher_norm")
    assert "has no final norm" not in said
    latents = cache.open_cache(tmp_path / "normed").latents(0).astype(np.float32)
    assert np.allclose(latents.mean(-1), 0, atol=1e-3)
    assert np.allclose(latents.std(-1), 1, atol=0.01)


# ---- another grid for the student
def test_shares_of_cells():
    """Sixteen cells on fourteen, and the reverse: against cells cut into their common parts."""
    for n, m in ((16, 14), (14, 16), (3, 2), (5, 5), (1, 4)):
        fine = np.repeat(np.eye(n), m, axis=0).reshape(m, n, n).mean(1)  # n * m parts of 1 / m
        assert np.allclose(caching.overlaps(n, m), fine)
    x = torch.randn(2, 2 * 16 * 16, 5)
    made = caching.by_area(x, (2, 16, 16), (2, 14, 14))
    assert made.shape == (2, 2 * 14 * 14, 5)
    assert torch.allclose(made.mean(1), x.mean(1), atol=1e-5)  # nothing is lost
    ramp = torch.arange(16.0).repeat(16, 1)  # [y, x]: rises along x alone
    made = caching.by_area(ramp.reshape(1, 256, 1), (1, 16, 16), (1, 14, 14)).reshape(14, 14)
    assert torch.allclose(made, made[:1].expand(14, 14)) and (made[0].diff() > 0).all()


@pytest.fixture(scope="module")
def resampled(world, tmp_path_factory):
    """A cache of a V-JEPA 2 of 64 pixels for students of 48, and one of its own grid."""
    folder = tmp_path_factory.mktemp("resampled")
    v_jepa(crop_size=64).save_pretrained(folder / "teacher")
    flags = ["--teacher", "teacher", "--data", world / "data", "--frames", 4, "--dtype", "fp32"]
    run(folder, "cache_latents", *flags, "--student_resolution", 48, "--out", "small")
    run(folder, "cache_latents", *flags, "--out", "own")
    fine = ["--student_resolution", 64, "--patch", 8, "--limit", 3]
    run(folder, "cache_latents", *flags, *fine, "--out", "fine")
    return folder


def test_latents_are_put_on_the_students_grid(resampled):
    small, own = (cache.open_cache(resampled / name) for name in ("small", "own"))
    assert (small.view.size, small.view.short_side) == (48, 48 * own.view.short_side // 64)
    assert small.teacher_identity["shown"] == own.view.to_dict()
    assert small.latent_shape == [2 * 3 * 3, 48] and own.latent_shape == [2 * 4 * 4, 48]
    for row in range(len(own)):
        latents = torch.from_numpy(own.latents(row)).float()[None]
        expected = caching.by_area(latents, (2, 4, 4), (2, 3, 3))[0]
        found = torch.from_numpy(small.latents(row)).float()
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)  # both are float16
    assert small.patches(0).shape == (18, 3 * 2 * 16 * 16)


def test_jittered_views_and_repair_on_the_students_grid(resampled, world):
    flags = ["--teacher", "teacher", "--data", world / "data", "--frames", 4, "--dtype", "fp32"]
    flags += ["--student_resolution", 48, "--views", 2, "--limit", 4, "--out", "views"]
    run(resampled, "cache_latents", *flags)
    made = cache.open_cache(resampled / "views")
    encoder = load_teacher(resampled / "teacher", asked=Asked(4, 64))
    rows = {row.id: row for row in load_split(str(world / "data"), "train")}
    shown = views.View.from_dict(made.teacher_identity["shown"])
    for record in range(len(made)):
        name, number = made.ids.fields(record)
        own, of_teacher = (
            read_row(rows[name], [dataclasses.replace(view, view=number)])[0]
            for view in (made.view, shown)
        )
        patches = ops.patchify(torch.from_numpy(own.copy())[None], 16, 2)[0]
        assert np.array_equal(made.patches(record), patches)
        latents = encoder.encode(of_teacher)[None].detach()
        expected = caching.by_area(latents, (2, 4, 4), (2, 3, 3))[0]
        found = torch.from_numpy(made.latents(record)).float()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    file = resampled / "views" / "latents-00000.npy"
    before = file.read_bytes()
    file.write_bytes(before[:-4] + b"spam")
    run(resampled, "cache_latents", *flags, "--repair")
    assert file.read_bytes() == before


def test_a_student_may_have_another_patch(resampled):
    fine, own = (cache.open_cache(resampled / name) for name in ("fine", "own"))
    assert fine.view == own.view and fine.teacher_identity["shown"] == own.view.to_dict()
    assert not cache_format.agree_on(fine.teacher_identity, own.teacher_identity)
    assert fine.patches(0).shape == (2 * 8 * 8, 3 * 2 * 8 * 8)
    latents = torch.from_numpy(own.latents(0)).float()[None]
    expected = caching.by_area(latents, (2, 4, 4), (2, 8, 8))[0]
    torch.testing.assert_close(torch.from_numpy(fine.latents(0)).float(), expected)


def test_its_students_train_and_are_measured_by_such_a_cache_alone(resampled, world):
    flags = [
        "--cache",
        "small",
        "--val_cache",
        "small",
        "--training_videos",
        "--max_steps",
        3,
        *SMALL,
    ]
    run(resampled, "train", *flags, "--run_name", "s")
    (path,) = resampled.glob("checkpoints/s_*/last.pth")
    run(resampled, "eval_distill", "--checkpoint", path, "--cache", "small", "--training_videos")
    told = error_of(
        resampled, "eval_distill", "--checkpoint", path, "--data", world / "data",
        "--teacher", "teacher", "--split", "validation",
    )  # fmt: skip
    assert "sees other clips than its teacher" in told


# ---- the hub
def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """What it holds on this machine, without network; and what is said where it holds nothing."""
    hub_of = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_of))
    snapshot = hub_of / "models--owner--name" / "snapshots" / "abc"
    v_jepa().save_pretrained(snapshot)
    (hub_of / "models--owner--name" / "refs").mkdir()
    (hub_of / "models--owner--name" / "refs" / "main").write_text("abc")
    teacher = load_teacher("owner/name")
    assert teacher.name == "owner/name" and teacher.config.dim == 48
    with pytest.raises(InputError, match="hf download owner/other --local-dir other") as caught:
        load_teacher("owner/other")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="hf download owner/name --local-dir name"):
        hub.download("owner/name")


def test_what_a_policy_imports_beside_a_model_of_its_own(tmp_path):
    (tmp_path / "model.py").write_text("mine = True\n")
    lines = """
from salt import StreamingEncoder, export_transformers, load_encoder
import model
assert model.mine and load_encoder.__module__ == "salt.encoders"
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environ}
    done = subprocess.run([sys.executable, "-c", lines], **how)
    assert done.returncode == 0, done.stderr


def test_nothing_optional_is_imported_unless_asked_for():
    optional = "transformers pyarrow onnx onnxscript onnxruntime huggingface_hub torchvision timm"
    lines = f"""
import subprocess
import sys
import model
from salt import caching, encoders, initial, lerobot, probed, stream, task, teachers
from salt import StreamingEncoder, export_transformers, load_encoder
found = set({optional.split()!r}) & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
