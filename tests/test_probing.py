"""Frozen features on disk, and the heads that read them: known answers, and none where there is
none.
"""

import copy
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from salt import probing, verdict
from salt.errors import InputError
from salt.features import Features, Source, pixel_sources
from salt.probing import Labelled

GRID = (4, 3, 3)
DIM = 64


def made(tmp_path, tokens):
    """Features that hold `tokens` float [n, N, D] as they are."""
    given = iter(tokens.split(16))
    source = Source("planted", GRID, tokens.shape[2], lambda clips: next(given))
    features = Features(tmp_path, [source], len(tokens))
    for part in tokens.split(16):
        features.add(np.zeros((len(part), 2, 8, 8, 3), np.uint8))
    return features


def test_a_bank_is_cross_attention_multiplied_out():
    """Against attention of a query by PyTorch, with matrices for queries, keys and values."""
    torch.manual_seed(0)
    dim, heads, out = 128, 2, 5
    query = torch.randn(dim, dtype=torch.float64)
    wq, wk, wv = 0.1 * torch.randn(3, dim, dim, dtype=torch.float64)
    w, b = torch.randn(out, dim, dtype=torch.float64), torch.randn(out, dtype=torch.float64)
    bank = probing.AttentiveBank(3, dim, out, heads).double()
    q = (wq @ query).unflatten(0, (heads, -1))  # [h, e]
    k, v = (matrix.unflatten(0, (heads, -1)) for matrix in (wk, wv))  # [h, e, d]
    with torch.no_grad():
        bank.seen[1] = torch.einsum("he,hed->hd", q, k) / 8  # sqrt of 64
        bank.weight[1] = torch.einsum("ohe,hed->ohd", w.unflatten(1, (heads, -1)), v).flatten(1)
        bank.bias[1] = b
    tokens = torch.randn(4, 36, dim, dtype=torch.float64)
    x = F.layer_norm(tokens, (dim,), eps=1e-6)
    parts = ((wq @ query).expand(4, 1, dim), x @ wk.T, x @ wv.T)
    parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    expected = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)[:, 0] @ w.T + b
    torch.testing.assert_close(bank(tokens)[1], expected)


def test_each_of_a_bank_is_trained_as_alone(tmp_path):
    """By AdamW of PyTorch, at its own rate and decay."""
    torch.manual_seed(0)
    features = made(tmp_path, torch.randn(8, 36, DIM))
    y = torch.randn(8, 2)
    bank = probing.AttentiveBank(2, DIM, 2, 1)
    alone = probing.AttentiveBank(1, DIM, 2, 1)
    alone.load_state_dict({name: value[1:] for name, value in bank.state_dict().items()})
    rates, decays = torch.tensor([1e-2, 1e-3]), torch.tensor([0.8, 0.1])
    how = {"steps": 5, "batch_size": 8, "device": "cpu"}
    probing.train_bank(
        bank,
        features,
        "planted",
        np.arange(8),
        y,
        rates,
        decays,
        random=np.random.default_rng(0),
        **how,
    )
    groups = [
        {
            "params": [p for p in alone.parameters() if (p.dim() > 2) == decayed],
            "weight_decay": 0.1 * decayed,
        }
        for decayed in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999))
    random = np.random.default_rng(0)
    for step in range(5):
        for group in groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 5))
        rows = random.permutation(8)
        (alone(features.read("planted", rows))[0] - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(bank.state_dict()[name][1:], value, rtol=1e-4, atol=1e-5)


def test_a_pooler_is_that_of_transformers():
    """V-JEPA 2's, of its own depth, with the same weights."""
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler, VJEPA2Config

    torch.manual_seed(0)
    dim = 32
    config = VJEPA2Config(
        hidden_size=dim,
        num_attention_heads=4,
        num_pooler_layers=3,
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    theirs = VJEPA2AttentivePooler(config)
    ours = probing.AttentivePooler(dim, 5, depth=4, heads=4)
    with torch.no_grad():
        for p in ours.parameters():  # biases and norms too
            p.add_(0.3 * torch.randn_like(p))
    q, k, v = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    state = {"query_tokens": ours.query[None, None]}

    def give(name, weight, bias):
        state.update({f"{name}.weight": weight, f"{name}.bias": bias})

    for number, block in enumerate(ours.blocks):
        place = f"self_attention_layers.{number}"
        inner = block.self_attn
        parts = inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
        for name, weight, bias in zip((q, k, v), *parts):
            give(f"{place}.{name}", weight, bias)
        names = {"self_attn.out_proj": inner.out_proj, "mlp.fc1": block.linear1}
        names |= {"mlp.fc2": block.linear2, "layer_norm1": block.norm1, "layer_norm2": block.norm2}
        for name, module in names.items():
            give(f"{place}.{name}", module.weight, module.bias)
    place = "cross_attention_layer"
    names = {"cross_attn.q_proj": ours.q, "mlp.fc1": ours.fc1, "mlp.fc2": ours.fc2}
    names |= {"layer_norm1": ours.norm1, "layer_norm2": ours.norm2}
    for name, module in names.items():
        give(f"{place}.{name}", module.weight, module.bias)
    for name, weight, bias in zip("kv", ours.kv.weight.chunk(2), ours.kv.bias.chunk(2)):
        give(f"{place}.cross_attn.{name}_proj", weight, bias)
    theirs.load_state_dict(state)
    tokens = torch.randn(3, 36, dim)
    torch.testing.assert_close(ours(tokens), ours.linear(theirs(tokens)))
    with pytest.raises(InputError, match="40 numbers do not divide into 16 heads"):
        probing.AttentivePooler(40, 5)


def test_each_pooler_of_a_bank_is_trained_as_alone(tmp_path, monkeypatch):
    """By AdamW of PyTorch, at its own rate, with all parameters decayed; a batch that is read in
    parts is a batch.
    """
    monkeypatch.setattr(probing, "AT_ONCE", 3)
    torch.manual_seed(0)
    features = made(tmp_path, torch.randn(8, 36, DIM))
    y = torch.arange(8) % 3
    bank = probing.PoolerBank(2, DIM, 3, 2, 4)
    alone = copy.deepcopy(bank[1])
    numbers = np.arange(8)
    rates, decays = torch.tensor([1e-2, 1e-3]), torch.tensor([0.8, 0.1])
    how = {"steps": 4, "batch_size": 8, "random": np.random.default_rng(0), "device": "cpu"}
    probing.train_bank(bank, features, "planted", numbers, y, rates, decays, **how)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3, weight_decay=0.1)
    random = np.random.default_rng(0)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 4))
        rows = random.permutation(8)
        F.cross_entropy(alone(features.read("planted", rows)), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(bank[1].state_dict()[name], value, rtol=1e-4, atol=1e-5)


def planted(count, classes=4, seed=0):
    """Tokens of noise, of which one, anywhere, says the class; its sign is random, so that means
    say nothing.
    """
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(count, math.prod(GRID), DIM)).astype(np.float32)
    y = random.integers(0, classes, count)
    directions = np.random.default_rng(99).normal(size=(classes, DIM))
    directions = 12 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    for clip, label, place in zip(tokens, y, random.integers(0, len(tokens[0]), count)):
        clip[place] += directions[label]
    return torch.from_numpy(tokens), y


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_attentive_head_finds_a_planted_token(tmp_path, shuffled):
    tokens, y = planted(300)
    known = y.copy()
    if shuffled:
        known[:200] = np.random.default_rng(1).permutation(y[:200])
    numbers = np.arange(300)
    with made(tmp_path, tokens) as features:
        train = Labelled(numbers[:200], known[:200], numbers[:200])
        said = probing.probe(features, "planted", "attentive", train, numbers[200:])
    right = (said == y[200:]).mean()
    assert right < 0.4 if shuffled else right > 0.9


def test_an_attentive_head_says_where_a_thing_is(tmp_path):
    """Of tokens that know nothing of their places; also where half of the values are missing."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(300, 36, DIM)).astype(np.float32)
    places = random.integers(0, 36, 300)
    tokens[np.arange(300), places, :8] += 4
    y = np.stack(np.unravel_index(places, GRID), axis=1).astype(np.float32)
    y = np.concatenate([y, random.normal(size=(300, 1)).astype(np.float32)], axis=1)
    known = y.copy()
    known[::2, 1] = np.nan
    numbers = np.arange(300)
    with made(tmp_path, torch.from_numpy(tokens)) as features:
        train = Labelled(numbers[:200], known[:200], numbers[:200])
        said = probing.probe(features, "planted", "attentive", train, numbers[200:])
    score = verdict.Score(said, y[200:], numbers[200:], y[:200].mean(0))
    assert score.each[[0, 2]].min() > 0.8 and score.each[1] > 0.4 and score.each[3] < 0.1


def test_a_pooler_of_depth_4_finds_a_planted_token(tmp_path, monkeypatch):
    """All that were asked for answer, where none is to be chosen: here one."""
    monkeypatch.setattr(probing, "RATES", (3e-3,))
    monkeypatch.setattr(probing, "DECAYS", (0.01,))
    tokens, y = planted(300)
    numbers = np.arange(300)
    train = Labelled(numbers[:200], y[:200], numbers[:200])
    how = probing.Fitting(epochs=6, least_steps=1, depth=4, heads=2, choose=False)
    with made(tmp_path, tokens) as features:
        said = probing.answers(features, "planted", "attentive", train, numbers[200:], how)
    assert said.shape == (1, 100, 4)
    np.testing.assert_allclose(said.sum(-1), 1, rtol=1e-5)
    assert (said[0].argmax(-1) == y[200:]).mean() > 0.7  # chance: 0.25


def test_clips_that_are_read_as_one_follow_one_another(tmp_path):
    """And a linear head sees when each was."""
    tokens = torch.randn(6, 36, 8).half().float()
    numbers = np.array([[4, 1], [0, 5]])
    with made(tmp_path, tokens) as features:
        torch.testing.assert_close(
            features.read("planted", numbers), tokens[numbers.ravel()].view(2, 72, 8)
        )
        apart = features.pooled("planted", "grid", numbers.ravel()).reshape(2, -1)
        np.testing.assert_allclose(features.pooled("planted", "grid", numbers), apart, rtol=1e-6)


def test_linear_heads_say_probabilities_of_all_classes(tmp_path):
    """Also of one that no video shows."""
    x = np.repeat([[0.0], [4.0]], 20, axis=0).astype(np.float32)
    x += 0.1 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    said = probing.fit_linear(x, np.repeat([0, 2], 20), np.arange(40), x[[0, -1]])
    np.testing.assert_allclose(said.sum(1), 1)
    assert said[:, 1].tolist() == [0, 0] and said.argmax(1).tolist() == [0, 2]


def test_linear_heads_read_what_is_linear_and_know_where(tmp_path):
    """A class that is in which cell a bump lies: the grid tells, the mean over space does not."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(240, 36, 8)).astype(np.float32)
    y = random.integers(0, 2, 240)
    tokens = tokens.reshape(240, 4, 3, 3, 8)
    tokens[np.arange(240), :, :, 2 * y, 0] += 1.5
    numbers = np.arange(240)
    with made(tmp_path, torch.from_numpy(tokens.reshape(240, 36, 8))) as features:
        train = Labelled(numbers[:160], y[:160], numbers[:160])
        right = {
            head: (probing.probe(features, "planted", head, train, numbers[160:]) == y[160:]).mean()
            for head in ("mean", "grid")
        }
        values = tokens.reshape(240, 4, 9, 8).mean((1, 2))[:, :2] * 10 + 3
        labelled = Labelled(numbers[:160], values[:160].astype(np.float32), numbers[:160])
        said = probing.probe(features, "planted", "mean", labelled, numbers[160:])
    assert right["grid"] > 0.95 and right["mean"] < 0.7
    score = verdict.Score(said, values[160:], numbers[160:], values[:160].mean(0))
    assert score.value > 0.9 and score.each.min() > 0.9


def test_turning_to_principal_axes_changes_no_fit(monkeypatch):
    monkeypatch.setattr(probing, "COLUMNS", 70)  # of 300, so that there are several blocks
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    random = np.random.default_rng(0)
    x, w = random.normal(size=(60, 300)).astype(np.float32), random.normal(size=(300, 2))
    y = (x @ w).astype(np.float32)
    alpha = 300 / 100 / 0.01
    scaler = StandardScaler().fit(x[:40])
    expected = (
        Ridge(alpha=alpha).fit(scaler.transform(x[:40]), y[:40]).predict(scaler.transform(x[40:]))
    )
    said = probing.fit_linear(x[:40], y[:40], np.arange(40), x[40:], strengths=[0.01])
    np.testing.assert_allclose(said, expected, rtol=1e-3, atol=1e-2)


def test_features_leave_nothing_behind_and_ask_for_room(tmp_path, monkeypatch):
    with made(tmp_path, torch.randn(20, 36, 4)) as features:
        assert features.count == 20 and len(os.listdir(tmp_path)) == 1
        assert features.read("planted", [19, 0]).shape == (2, 36, 4)
    assert os.listdir(tmp_path) == []
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="the features of 20 clips take 0.0 GB, and"):
        made(tmp_path, torch.randn(20, 36, 4))


def test_pixels_are_means_of_cells_and_their_changes():
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 48, 50, 3), np.uint8)
    pixels, differences = pixel_sources(4)
    found = pixels.tokens(clips).reshape(2, 4, 7, 7, 3)
    assert found[1, 2, 6, 0, 1] == pytest.approx(clips[1, 2, 41:, :7, 1].mean() / 255, rel=1e-5)
    changes = differences.tokens(clips).reshape(2, 3, 7, 7, 3)
    np.testing.assert_allclose(changes[:, 1], found[:, 2] - found[:, 1], atol=1e-6)


def test_scores_and_their_differences_are_over_videos():
    random = np.random.default_rng(0)
    videos = np.repeat(np.arange(50), 4)
    y = random.integers(0, 2, 200)
    often = np.where(random.random(200) < 0.9, y, 1 - y)
    seldom = np.where(random.random(200) < 0.6, y, 1 - y)
    good, bad = (verdict.Score(said, y, videos) for said in (often, seldom))
    assert good.value == pytest.approx((often == y).mean())
    low, high = good.interval()
    assert low < good.value < high and high - low < 0.2
    assert verdict.verdict("a", good, "b", bad).startswith("a beats b: +0.")
    assert verdict.verdict("b", bad, "a", good).startswith("b is worse than a: -0.")
    assert "does not differ from" in verdict.verdict("a", good, "a", good) or "cannot" in (
        verdict.verdict("a", good, "a", good)
    )
    values = random.normal(size=(200, 3))
    r2 = verdict.Score(values + 0.1 * random.normal(size=(200, 3)), values, videos, values.mean(0))
    assert r2.value == pytest.approx(0.99, abs=0.01) == r2.each.mean()
    half = verdict.mean_score(
        [r2, verdict.Score(values * 0 + values.mean(0), values, videos, values.mean(0))]
    )
    assert half.value == pytest.approx(r2.value / 2, abs=1e-6)
