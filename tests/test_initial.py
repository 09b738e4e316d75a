"""--init_from: a student that begins with the weights of another encoder, or of an image ViT."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from model import EncoderConfig
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from salt.initial import initialise
from salt.teachers import load_teacher
from tests.stages import SMALL, error_of, run
from tests.test_model import TINY, clips_for, pixel_values, shake
from tests.test_pretrained import OF_PIXELS, image_model, v_jepa

transformers = pytest.importorskip("transformers")
MEAN, STD = OF_PIXELS["image_mean"], OF_PIXELS["image_std"]


def student(**changes):
    shape = dict(dim=48, depth=3, heads=4, mlp_dim=96, frames=4, size=32, eps=1e-12)
    return model.Encoder(EncoderConfig(**{**shape, **changes})).eval()


def test_a_videomae_under_another_normalisation(tmp_path):
    config = transformers.VideoMAEConfig(**{**TINY, "num_hidden_layers": 3}, use_mean_pooling=False)
    shake(transformers.VideoMAEModel(config)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OF_PIXELS))
    ours, theirs = student(mean=(0.3, 0.2, 0.1), std=(0.5, 0.6, 0.7)), load_teacher(tmp_path)
    said = initialise(ours, str(tmp_path))
    assert said.endswith(str(tmp_path)) and theirs.config.mean == tuple(MEAN)
    clips = clips_for(ours.config)
    torch.testing.assert_close(ours.encode(clips), theirs.encode(clips), rtol=1e-4, atol=1e-4)


def test_a_v_jepa_2_but_for_its_biases_on_keys(tmp_path):
    v_jepa(mlp_ratio=2.0).save_pretrained(tmp_path)
    ours, theirs = student(positions="rope", eps=1e-6), load_teacher(tmp_path)
    assert "without k_bias" in initialise(ours, str(tmp_path))
    for block in theirs.blocks:
        block.attn.k_bias = None
    clips = clips_for(ours.config)
    torch.testing.assert_close(ours.encode(clips), theirs.encode(clips), rtol=1e-4, atol=1e-4)


def tokens_of_still_clips(net, kind, ours):
    """(their tokens of one frame, ours of a clip that shows it all the time, in its first tubelet),
    both without positions, which are of another kind, and with each token alone.
    """
    clips = clips_for(ours.config)[:, :1].expand(-1, ours.config.frames, -1, -1, -1)
    with torch.no_grad():
        embedded = ours.patch_embed(ours.normalise(model.ops.patchify(clips.contiguous(), 16, 2)))
        frame = pixel_values(clips, MEAN, STD)[:, 0]
        patches = net.embeddings.patch_embeddings
        theirs = (getattr(patches, "projection", None) or patches.proj)(frame).flatten(2).mT
    return embedded[:, : theirs.shape[1]], theirs


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])
def test_an_image_model_inflated_over_time(tmp_path, kind):
    more = {"mlp_ratio": 2} if kind.startswith("dinov2") else {}
    net = image_model(kind, tmp_path, **more)
    ours = student(mean=(0.1, 0.2, 0.3), std=(0.4, 0.4, 0.4))
    said = initialise(ours, str(tmp_path))
    assert "inflated over 2 frames" in said and "k_bias" in said
    embedded, theirs = tokens_of_still_clips(net, kind, ours)
    torch.testing.assert_close(embedded, theirs, rtol=1e-4, atol=1e-4)
    x = torch.randn(
        2, 5, 48
    )  # a block each; keys' biases are one number a query, which softmax drops
    layers = net.encoder.layer if hasattr(net, "encoder") else net.layers
    for block, layer in zip(ours.blocks, layers, strict=True):
        with torch.no_grad():
            found, expected = block(x, (5,)), layer(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.norm.weight, net.layernorm.weight)


def test_timm(tmp_path):
    """As timm writes them: the same network as transformers' ViT, under its names."""
    image_model("vit", tmp_path / "vit")
    state = {}
    names = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "attention.output.dense": "attn.proj",
        "output.dense": "mlp.fc2",
    }
    for name, x in load_file(tmp_path / "vit" / "model.safetensors").items():
        for theirs, timms in names.items():
            if f"{theirs}." in name:
                name = name.replace(theirs, timms)
                break
        name = name.replace("encoder.layer", "blocks").replace("layernorm", "norm")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        state[name] = x.contiguous()
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [
                state.pop(f"blocks.{i}.attention.attention.{p}.{kind}")
                for p in ("query", "key", "value")
            ]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        state[f"blocks.{i}.ls1.gamma"] = torch.full((48,), 0.5)
    (tmp_path / "timm").mkdir()
    save_file(state, tmp_path / "timm" / "model.safetensors")
    config = {"architecture": "vit", "pretrained_cfg": {"mean": MEAN, "std": STD}}
    config["model_args"] = {"num_heads": 4}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    of_timm, of_vit = student(), student()
    initialise(of_timm, str(tmp_path / "timm"))
    initialise(of_vit, str(tmp_path / "vit"))
    for name, x in of_vit.state_dict().items():
        halved = 0.5 if "attn.proj" in name else 1
        torch.testing.assert_close(of_timm.state_dict()[name], halved * x)


def test_in_training(world, tmp_path):
    flags = ["--cache", world / "latents", *SMALL, "--max_steps", 1]
    run(tmp_path, "train", *flags, "--run_name", "first")
    (first,) = tmp_path.glob("checkpoints/first_*/last.pth")
    how = ["--init_from", first, "--lr", 0, "--lr_end", 0]
    said = run(tmp_path, "train", *flags, *how, "--run_name", "second", "--ema", 0.5)
    assert "the student begins with the weights of" in said
    (second,) = tmp_path.glob("checkpoints/second_*/last.pth")
    before, after = load_checkpoint(first), load_checkpoint(second)
    for name, x in before["student"].items():
        assert torch.equal(after["student"][name], x) and torch.equal(
            after["ema"]["student"][name], x
        )
    told = error_of(tmp_path, "train", *flags, "--init_from", first, "--depth", 2)
    assert "has depth 1, the student 2" in told
    told = error_of(tmp_path, "train", *flags, "--init_from", "gone.pth")
    assert "there is nothing at gone.pth" in told
    again = ["--resume", second, "--ema", 0.5, "--lr", 0, "--lr_end", 0]
    told = error_of(tmp_path, "train", *flags, *again)
    assert "was trained with --init_from" in told


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 2}, "has 3 blocks, the student 2"),
        ({"dim": 64}, "has shape .* the student's"),
        ({"heads": 8}, "has 4 attention heads, the student 8"),
        ({"patch": 8}, "has shape .* see --size"),
    ],
)
def test_another_shape(tmp_path, changes, message):
    image_model("vit", tmp_path)
    with pytest.raises(InputError, match=message):
        initialise(student(**changes), str(tmp_path))


def test_what_has_no_place_is_refused_and_other_positions_are_said(tmp_path):
    image_model("vit", tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    state = load_file(file)
    more = {"encoder.layer.0.attention.attention.q_norm.weight": torch.zeros(12)}
    save_file(state | more, file)
    with pytest.raises(InputError, match="q_norm.weight and 0 others that our blocks have no"):
        initialise(student(), str(tmp_path / "vit"))
    save_file(state, file)
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="does not say how pixels are normalised"):
        initialise(student(), str(tmp_path / "vit"))
    v_jepa(mlp_ratio=2.0).save_pretrained(tmp_path / "v")
    said = initialise(student(eps=1e-6), str(tmp_path / "v"))
    assert "whose positions are rope, the student's table" in said


def test_other_image_models_are_refused(tmp_path):
    image_model("clip_vision_model", tmp_path, hidden_act="gelu")
    with pytest.raises(InputError, match="of the kind 'clip_vision_model' are not read"):
        initialise(student(), str(tmp_path))
