"""Files of weights that state more than they hold: one line, before any of it takes memory."""

import json
import struct
import zipfile

import pytest
import torch

import model
from model import EncoderConfig
from salt import encoders, teachers
from salt.checkpoint import CHECKPOINT_PARTS, save_checkpoint
from salt.errors import InputError
from salt.positions import position_table
from salt.torch_files import load_pickle
from tests.test_model import as_original, shake

CONFIG = EncoderConfig(dim=64, depth=1, heads=1, mlp_dim=96, frames=4, size=32)
PREDICTOR = {"dim_in": 64, "dim_out": 8, "tokens": 8, "families": ["short"], "dim": 16, "depth": 1}
PREDICTOR["heads"] = 2
SPACE = {"target": "latents", "normalise": "none", "mean": None, "rstd": None}
HUGE = 2**40


def in_one_line(path, message, loads=(teachers.load_teacher, encoders.load_encoder)):
    for load in loads:
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    encoders.export_transformers(shake(model.Encoder(CONFIG)), tmp_path / "exported")
    return tmp_path / "exported"


def write_safetensors(folder, header, length=None):
    content = json.dumps(header).encode()
    stated = struct.pack("<Q", len(content) if length is None else length)
    (folder / "model.safetensors").write_bytes(stated + content)


@pytest.mark.parametrize(
    "shape, end, length",
    [([2**20, 2**20], 2**42, None), ([HUGE, HUGE], 0, None), ([1], 4, 2**62), ([HUGE, 0], 0, None)],
    ids=[
        "longer than the file",
        "overflow",
        "a header of 2^62 bytes",
        "no numbers of a huge shape",
    ],
)
def test_safetensors_headers(folder, shape, end, length):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    name = "embeddings.patch_embeddings.projection.weight"
    write_safetensors(folder, {name: entry}, length)
    in_one_line(folder, "damaged|lacks the weight")


@pytest.mark.parametrize(
    "name, message",
    [
        ("hidden_size", "shape"),
        ("intermediate_size", "shape"),
        ("num_frames", "more than any model here has"),
        ("image_size", "more than any model here has"),
        ("num_hidden_layers", "lacks the weight"),
    ],
)
def test_configurations_of_huge_models(folder, name, message):
    config = json.loads((folder / "config.json").read_text())
    value = HUGE if name != "hidden_size" else 2**22
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    in_one_line(folder, message)


def test_a_configuration_of_a_terabyte(folder):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(HUGE)
    in_one_line(folder, "config.json has 1099511627776 bytes")


def packed(path, source, name=None):
    """A torch file again as a compressed zip; the member that ends in `name` as 64 MB of zeros."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            zeros = name and info.filename.endswith(name)
            new.writestr(info.filename, bytes(2**26) if zeros else old.read(info))


@pytest.mark.parametrize("name", ["data/0", "data.pkl", "version"])
def test_zip_bombs(tmp_path, name):
    torch.save({"salt_vla": 1, "w": torch.zeros(10)}, tmp_path / "small.pth")
    packed(tmp_path / "bomb.pth", tmp_path / "small.pth", name)
    loads = (teachers.load_teacher, encoders.load_encoder, load_pickle)
    in_one_line(tmp_path / "bomb.pth", r"has \d+ bytes and states \d{8,} of content", loads)


def test_the_stated_size_of_a_zips_member(tmp_path):
    torch.save({"salt_vla": 1, "w": torch.zeros(10)}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    at = content.index(
        b"PK\x01\x02"
    )  # the first entry of its directory: two sizes stand 20 bytes on
    content[at + 20 : at + 28] = struct.pack("<II", 2**32 - 16, 2**32 - 16)
    (tmp_path / "x.pth").write_bytes(content)
    in_one_line(tmp_path / "x.pth", "states 4294", (teachers.load_teacher, load_pickle))


def test_tensors_of_more_numbers_than_they_hold(tmp_path):
    """Strides of 0 make many numbers of one; copying them as float32 would take 2^42 bytes."""
    named = as_original(shake(model.Encoder(CONFIG)))
    named["patch_embed.proj.bias"] = torch.zeros(1, dtype=torch.half).expand(HUGE)
    torch.save({"model": named}, tmp_path / "x.pth")
    in_one_line(tmp_path / "x.pth", "more than is there", [teachers.load_teacher])
    named["patch_embed.proj.bias"] = torch.zeros(HUGE, layout=torch.sparse_coo)
    torch.save({"model": named}, tmp_path / "x.pth")
    in_one_line(tmp_path / "x.pth", "layout", [teachers.load_teacher])


def checkpoint(path, config=(), predictor=(), **state):
    encoder = shake(model.Encoder(CONFIG))
    parts = dict.fromkeys(CHECKPOINT_PARTS)
    parts |= {"view": {"frames": 4, "size": 32, "short_side": 32}}
    parts |= {"student": {**encoder.state_dict(), **state}}
    parts |= {"encoder_config": {**model.plain(CONFIG), **dict(config)}}
    parts |= {"predictor": model.Predictor(**PREDICTOR).state_dict()}
    parts |= {"predictor_config": {**PREDICTOR, **dict(predictor)}}
    parts |= {"space": {**SPACE, "zero": torch.zeros(8, 8)}}
    save_checkpoint(path, parts)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"depth": 10**9}, "holds 1 blocks, and its configuration says 1000000000"),
        ({"dim": 2**22, "heads": 2}, "patch_embed.weight has shape"),
        ({"mlp_dim": HUGE}, "fc1.weight has shape"),
        ({"frames": HUGE}, "more than any model here has"),
        ({"dim": HUGE}, "more than any model here has"),
    ],
)
def test_checkpoints_of_huge_encoders(tmp_path, config, message):
    checkpoint(tmp_path / "best.pth", config)
    in_one_line(tmp_path / "best.pth", message, (teachers.load_teacher, encoders.load_encoder))


@pytest.mark.parametrize(
    "predictor, message",
    [
        ({"depth": 10**9}, "holds 1 blocks"),
        ({"tokens": HUGE}, "more than any model here has"),
        ({"dim_out": HUGE}, "proj.weight has shape"),
        ({"families": [str(number) for number in range(1000)]}, "mask_tokens has shape"),
    ],
)
def test_checkpoints_of_huge_predictors(tmp_path, predictor, message):
    checkpoint(tmp_path / "best.pth", predictor=predictor)
    in_one_line(tmp_path / "best.pth", message, [encoders.load_salt])


def test_what_does_not_lie_is_loaded_as_it_was_saved(tmp_path):
    checkpoint(tmp_path / "best.pth")
    salt, _, saved = encoders.load_salt(tmp_path / "best.pth")
    for module, name in ((salt.student, "student"), (salt.predictor, "predictor")):
        assert all(
            torch.equal(value, saved[name][key]) for key, value in module.state_dict().items()
        )
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert module.position.table.device.type == "cpu"
    table = position_table(CONFIG.tokens, CONFIG.dim)
    assert torch.equal(salt.student.position.table, table)
