"""Where tokens stand: V-JEPA 2's rotations as transformers computes them, the table of t, y and x,
and encoders that see no more of a place than they are told.
"""

import pytest
import torch

import model
from salt.errors import InputError
from salt.positions import KINDS, Positions, position_table, rotations, turned
from salt.stream import StreamingEncoder

GRID = (4, 3, 3)


@pytest.mark.parametrize("heads, width", [(2, 64), (3, 32), (1, 6), (2, 88)])
@pytest.mark.parametrize("gathered", [True, False])
def test_rotations_are_those_of_vjepa2(heads, width, gathered):
    vjepa2 = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2")
    config = vjepa2.VJEPA2Config(crop_size=48, patch_size=16, frames_per_clip=8, tubelet_size=2)
    theirs = vjepa2.VJEPA2RopeAttention(config, heads * width, heads).eval()
    ours = model.Attention(heads * width, heads)
    with torch.no_grad():
        matrices = [part.weight for part in (theirs.query, theirs.key, theirs.value)]
        ours.qkv.weight.copy_(torch.cat(matrices))
        theirs.key.bias.zero_()
        ours.q_bias.copy_(theirs.query.bias)
        ours.v_bias.copy_(theirs.value.bias)
        ours.proj.load_state_dict(theirs.proj.state_dict())
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(36)[:20] for _ in range(2)]) if gathered else None
    x = 3 * torch.randn(2, 20 if gathered else 36, heads * width)
    positions = Positions("rope", GRID, heads * width, heads)
    with torch.no_grad():
        found = ours(x, (x.shape[1],), positions.turned_by(index))
        expected = theirs(x, index)[0]
        unturned = ours(x, (x.shape[1],))
    assert torch.allclose(found, expected, atol=1e-5)
    assert (unturned - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [16, 48, 90, 192])
def test_the_table_of_three_axes(dim):
    """A token's own is those of its t, y and x side by side, a quarter and three eighths each."""
    table = Positions("table3d", GRID, dim, 1).table
    assert table.shape == (36, dim)
    time = 2 * (dim // 8)
    across = 2 * ((dim - time) // 4)
    assert abs(time - dim / 4) < 2 and abs(across - 3 * dim / 8) < 2
    for t, y, x in ((0, 0, 0), (3, 1, 2), (2, 2, 0)):
        parts = ((t, 4, time), (y, 3, across), (x, 3, dim - time - across))
        own = torch.cat([position_table(most, width)[at] for at, most, width in parts])
        assert torch.equal(table[(t * 3 + y) * 3 + x], own)
    assert len(table.unique(dim=0)) == 36


def test_positions_of_gathered_tokens():
    index = torch.tensor([[3, 35], [0, 7]])
    x = torch.randn(2, 2, 48)
    for kind in ("table", "table3d"):
        positions = Positions(kind, GRID, 48, 2)
        assert torch.equal(positions.added_to(x, index), x + positions.table[index])
        assert positions.turned_by(index) is None
    rope = Positions("rope", GRID, 48, 2)
    assert torch.equal(rope.added_to(x, index), x)
    assert torch.equal(rope.turned_by(index)[:, 1, 1], rope.turned_by()[:, 0, 7])


def test_turning_is_done_in_float32_and_leaves_values_and_the_rest_alone():
    torch.manual_seed(0)
    cos, sin = rotations(GRID, 64)
    qkv = torch.randn(1, 36, 3, 2, 64)
    found = turned(qkv.bfloat16(), torch.stack([cos, sin])[:, None, :, None, None])
    exact = turned(qkv.bfloat16().double(), torch.stack([cos, sin])[:, None, :, None, None])
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
    assert torch.equal(found[:, :, 2], qkv.bfloat16()[:, :, 2])
    assert torch.equal(found[..., 60:], qkv.bfloat16()[..., 60:])  # 3 x 20 of 64 turn
    assert torch.equal(found[:, 0], qkv.bfloat16()[:, 0])  # at 0, 0, 0


@pytest.mark.parametrize("attends", ["all", "context"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_add_to_stays_in_float32(kind, attends):
    """Though all products are bfloat16's: of student, predictor and a stream's encoder."""
    config = model.EncoderConfig(
        dim=48, depth=2, heads=2, mlp_dim=96, frames=8, size=48, positions=kind
    )
    predictor = {"dim_in": 48, "dim_out": 6, "tokens": 36, "families": ["short"], "dim": 48}
    predictor |= {"depth": 2, "heads": 2, "positions": kind, "grid": GRID, "attends": attends}
    salt = model.build_salt(config, predictor)
    model.cast_matrices(salt, "bf16")
    added_to, products = [], []
    for block in (*salt.student.blocks, *salt.predictor.blocks):
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda _, given, made: added_to.append(given[0].dtype))
        block.fc2.register_forward_hook(lambda _, given, made: products.append(made.dtype))
    ids = torch.arange(2)
    patches = torch.randint(0, 256, (2, 36, 1536), dtype=torch.uint8)
    salt(patches, [model.sample_masks(ids, 0, 0, "short", GRID)])
    if kind == "rope":
        StreamingEncoder(salt.student.eval()).step(patches[:, :9])
    assert set(added_to) == {torch.float32} and set(products) == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_knows_places_by_its_index_alone(kind):
    torch.manual_seed(0)
    config = model.EncoderConfig(
        dim=48, depth=2, heads=2, mlp_dim=96, frames=8, size=48, positions=kind
    )
    encoder = model.Encoder(config).eval()
    patches = torch.randn(1, 36, config.patch_dim)
    order = torch.randperm(36)
    with torch.no_grad():
        plain = encoder(patches)
        shuffled = encoder(patches[:, order], order[None])
        moved = encoder(patches[:, order])
    assert torch.allclose(shuffled, plain[:, order], atol=1e-4)
    assert (moved - plain[:, order]).abs().max() > 0.1
    assert not {name for name in encoder.state_dict() if "position" in name}


def test_what_positions_refuse():
    for width, message in ((5, "even width of at least 6"), (4, "even width"), (9, "even width")):
        with pytest.raises(InputError, match=message):
            Positions("rope", GRID, 2 * width, 2)
    with pytest.raises(InputError, match="table, table3d, rope"):
        Positions("learnt", GRID, 64, 2)
    with pytest.raises(InputError, match="'learnt'"):
        model.EncoderConfig(positions="learnt")
    with pytest.raises(InputError, match="more than any model"):
        Positions("rope", (2**20, 2**5, 2**5), 64, 2)
    for grid in (None, (4, 3, 4)):
        with pytest.raises(InputError, match="its 36 tokens"):
            model.Predictor(48, 8, 36, ["short"], dim=48, depth=1, positions="rope", grid=grid)
