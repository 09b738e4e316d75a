"""What is read from frozen features: linear and attentive heads on the tokens of clips. What their
answers allow one to say: salt/verdict.py.

Heads are fitted on training videos, and what is to be chosen is chosen by a part of these; a
held-out video is answered once.
"""

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from salt.errors import InputError

STRENGTHS = tuple(10.0**k for k in range(-4, 3))  # inverse L2 of linear heads to choose from
# of attentive heads, V-JEPA 2's twenty (facebookresearch/vjepa2, configs/eval/vitl)
RATES = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
DECAYS = (0.01, 0.1, 0.4, 0.8)
BANK_HEADS = 4  # of attention
PLACE = 5.0  # AdamW's steps are alike for all: a planted token is found in 200, by 1.0 in 800
AT_ONCE = 16  # clips whose graph is kept, of a larger batch
COLUMNS = 4096  # of features, in float64


def fit_linear(x, y, groups, held_out, strengths=STRENGTHS, folds=5):
    """What a linear head, fitted on x, says of `held_out`.

    x         float32 [n, F], held_out [m, F]: standardised by x, and turned to its principal axes,
              which changes no L2-penalised fit and leaves at most n of F columns
    y         int [n]: classes, logistic regression; float [n, K]: values, ridge regression, nan
              where one is missing
    groups    int [n]: videos, whose clips stay in one fold of the cross-validation that chooses
              the strength
    Returns probabilities of the classes 0, 1, ... [m, max(y) + 1], or values [m, K], nan where y
    has none.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # two thread pools, torch's and BLAS's, spin against each other: 13 times slower
    with warnings.catch_warnings(), threadpool_limits(1):
        # the weakest penalties need not converge to lose
        warnings.simplefilter("ignore", ConvergenceWarning)
        columns = x.shape[1]
        x, held_out = turned(x, held_out)
        if np.issubdtype(y.dtype, np.integer):
            grid = {"C": list(strengths)}
            fitted = chosen(LogisticRegression(max_iter=500), grid, None, folds, x, y, groups)
            said = np.zeros((len(held_out), int(y.max()) + 1))
            said[:, fitted.classes_] = fitted.predict_proba(held_out)
            return said
        penalties = [columns / 100 / strength for strength in sorted(strengths)]
        return fit_values(x, y, groups, held_out, penalties, folds)


def turned(x, held_out):
    """x [n, F] and held_out [m, F], standardised by x and, where F is above n, turned to the at
    most n principal axes of x: float64.

    By inner products, COLUMNS at a time, so that beside x little is in memory: F is 74,000 of a
    ViT-L's cells.
    """
    from sklearn.decomposition import KernelPCA

    count, columns = x.shape
    blocks = [slice(start, start + COLUMNS) for start in range(0, columns, COLUMNS)]
    deviation = np.concatenate([x[:, some].std(0, dtype=np.float64) for some in blocks])
    # what hardly varies in a few clips would be divided by next to nothing
    scale = np.maximum(deviation, 0.1 * np.sqrt(np.mean(deviation**2)))
    scale[scale == 0] = 1.0

    def standardised(some):
        mean = x[:, some].mean(0, dtype=np.float64)
        return [torch.from_numpy((part[:, some] - mean) / scale[some]) for part in (x, held_out)]

    if columns <= count:
        return [part.numpy() for part in standardised(slice(None))]
    inner = torch.zeros(count, count, dtype=torch.float64)
    across = torch.zeros(len(held_out), count, dtype=torch.float64)
    for some in blocks:
        one, other = standardised(some)
        inner.addmm_(one, one.T)
        across.addmm_(other, one.T)
    axes = KernelPCA(kernel="precomputed", eigen_solver="dense", remove_zero_eig=True)
    return axes.fit_transform(inner.numpy()), axes.transform(across.numpy())


def fit_values(x, y, groups, held_out, penalties, folds):
    """Ridge regression, see fit_linear; values that the same clips lack are fitted together."""
    from sklearn.linear_model import Ridge

    said = np.full((len(held_out), y.shape[1]), np.nan)
    there = np.isfinite(y)
    for pattern in np.unique(there, axis=1).T:
        values = np.flatnonzero((there == pattern[:, None]).all(0))
        if not pattern.any():
            continue
        some = y[pattern][:, values]
        centre, spread = some.mean(0), np.maximum(some.std(0), 1e-6)
        # by the squared error of all folds: R2 of a fold of two clips is a lottery
        how = "neg_mean_squared_error", folds, x[pattern], (some - centre) / spread, groups[pattern]
        fitted = chosen(Ridge(alpha=penalties[0]), {"alpha": penalties}, *how)
        said[:, values] = fitted.predict(held_out).reshape(len(held_out), -1) * spread + centre
    return said


def chosen(head, grid, scoring, folds, x, y, groups) -> Any:
    """The head of the grid that cross-validation prefers, fitted; as it is, where all is of one
    group.
    """
    from sklearn.model_selection import GridSearchCV, GroupKFold

    folds = min(folds, len(np.unique(groups)))
    if folds < 2:
        return head.fit(x, y)
    return GridSearchCV(head, grid, scoring=scoring, cv=GroupKFold(folds)).fit(x, y, groups=groups)


class AttentiveBank(nn.Module):
    """Attentive poolers with a linear layer, `count` of them side by side: cross-attention of one
    learnt query to the tokens, with all that is linear in it multiplied out.

    The logit of a token is its product with W_k' q, a vector a head; the mean of values is the
    value of the mean, so W_v goes into the linear layer. What is left is that of V-JEPA's probe
    (Bardes et al. 2024, arXiv 2404.08471) without its MLP: tokens meet `count * heads` vectors, and
    no matrix, and twenty of them cost little more than one.

    grid  (t, h, w) of the tokens, whose places, three numbers of a size, then stand beside their
          features: a head that has found a thing says where it is, of any encoder (the spatial
          softmax of Finn et al. 2016, arXiv 1509.06113); None: features alone
    """

    places: torch.Tensor | None

    def __init__(self, count, dim, out, heads, grid=None):
        super().__init__()
        places = places_of(grid) if grid else None
        self.register_buffer("places", places, persistent=False)
        dim += 3 if grid else 0
        self.seen = nn.Parameter(0.02 * torch.randn(count, heads, dim))
        self.weight = nn.Parameter(0.02 * torch.randn(count, out, heads * dim))
        self.bias = nn.Parameter(torch.zeros(count, out))

    def forward(self, tokens):
        """tokens float32 [B, N, D], of S clips [B, S * N, D] -> [C, B, out]: what each of the
        `count` says.
        """
        x = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        if self.places is not None:
            places = self.places.repeat(x.shape[1] // len(self.places), 1)
            x = torch.cat([x, places.expand(len(x), -1, -1)], -1)
        heads = rearrange(self.seen, "c h d -> (c h) d")
        weights = torch.einsum("bnd,kd->bkn", x, heads).softmax(-1)
        mean = rearrange(weights @ x, "b (c h) d -> c b (h d)", c=len(self.seen))
        return torch.baddbmm(self.bias[:, None], mean, self.weight.transpose(1, 2))

    def parts(self):
        """What is to be run one after another: [(tokens) -> [c, B, out]]."""
        return [self]

    def own(self, values):
        """values [C], as factors of each parameter."""
        return [values.view(-1, *[1] * (p.dim() - 1)) for p in self.parameters()]

    def decayed(self):
        """Whether a parameter is: biases are not."""
        return [p.dim() > 2 for p in self.parameters()]


def places_of(grid):
    """float32 [N, 3]: t, y and x of the tokens of a grid, from -PLACE to PLACE."""
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    return PLACE * torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


class AttentivePooler(nn.Module):
    """V-JEPA 2's attentive classifier (Assran et al. 2025, arXiv 2506.09985; its code's
    src/models/attentive_pooler.py): depth - 1 pre-norm blocks of self-attention over all tokens,
    then cross-attention of one learnt query to them and an MLP, and a linear layer. The
    cross-attention has no output matrix, as there.

    Raises InputError where dim does not divide into heads.
    """

    def __init__(self, dim, out, depth=4, heads=16):
        super().__init__()
        if dim % heads:
            raise InputError(
                f"tokens of {dim} numbers do not divide into {heads} heads; give another number of"
                " heads"
            )
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = [nn.TransformerEncoderLayer(dim, heads, 4 * dim, **how) for _ in range(depth - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for name, p in self.named_parameters():
            if p.dim() > 1 or name == "query":
                nn.init.trunc_normal_(p, std=0.02)
            elif "norm" not in name:
                nn.init.zeros_(p)
        with torch.no_grad():
            for number, block in enumerate(blocks, 1):
                block.self_attn.out_proj.weight /= math.sqrt(2 * number)
                block.linear2.weight /= math.sqrt(2 * number)
            self.fc2.weight /= math.sqrt(2 * max(1, depth - 1))
        self.linear = nn.Linear(dim, out)

    def forward(self, tokens):
        """tokens float32 [B, N, D] -> [B, out]."""
        for block in self.blocks:
            tokens = block(tokens)
        q = self.q(self.query).expand(len(tokens), 1, -1)
        k, v = self.kv(self.norm1(tokens)).chunk(2, dim=-1)
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (q, k, v))
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 d -> b (h d)")
        x = self.query + seen
        return self.linear(x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class PoolerBank(nn.ModuleList):
    """AttentivePoolers side by side, with the methods of an AttentiveBank; all is decayed, as in
    V-JEPA 2. On a GPU they compute in bfloat16.
    """

    def __init__(self, count, dim, out, depth, heads):
        super().__init__(AttentivePooler(dim, out, depth, heads) for _ in range(count))

    def parts(self):
        def run(pooler, tokens):
            with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
                said = pooler(tokens)
            return said.float()[None]

        return [partial(run, pooler) for pooler in self]

    def own(self, values):
        return [value for value, pooler in zip(values, self) for _ in pooler.parameters()]

    def decayed(self):
        return [True for _ in self.parameters()]


def train_bank(bank, features, name, numbers, y, rates, decays, steps, batch_size, random, device):
    """AdamW with a rate and decay of its own for each of the bank, over one stream of batches.

    rates, decays: float32 [C]; the rate goes to 0 along half a cosine. Tokens are read once for
    all, AT_ONCE clips at a time, whose gradients add up to those of the batch.
    """
    parameters = list(bank.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    rates, decays = bank.own(rates), bank.own(decays)
    order = np.zeros(0, np.int64)
    for step in range(steps):
        if len(order) < batch_size:
            order = np.concatenate([order, random.permutation(len(numbers))])
        rows, order = order[:batch_size], order[batch_size:]
        for some in np.split(rows, range(AT_ONCE, batch_size, AT_ONCE)):
            tokens = features.read(name, numbers[some]).to(device)
            for part in bank.parts():  # each one's own loss, and no two graphs at a time
                (errors_of(part(tokens), y[some].to(device)).sum() / batch_size).backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        optimizer.zero_grad()
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for p, old, rate, decay, is_decayed in zip(
                parameters, before, rates, decays, bank.decayed()
            ):
                p.copy_(old + share * rate * ((p - old) - decay * old * is_decayed))


def errors_of(out, y):
    """[C, B]: cross-entropy of out [C, B, classes] against int64 y [B], or mean squared error of
    out [C, B, K] against float32 y [B, K], 0 where y is missing (nan).
    """
    if y.dtype == torch.int64:
        return torch.stack([F.cross_entropy(one, y, reduction="none") for one in out])
    return torch.where(y.isfinite(), out - y, 0.0).square().mean(-1)


@torch.no_grad()
def answers_of(bank, features, name, numbers, device, batch_size=64):
    """float32 [C, n, out]: what each of a bank says of these clips."""
    found = []
    for i in range(0, len(numbers), batch_size):
        tokens = features.read(name, numbers[i : i + batch_size]).to(device)
        found.append(torch.cat([part(tokens) for part in bank.parts()]).cpu())
    return torch.cat(found, dim=1)


def fit_attentive(features, name, train, held_out, how, device="cpu"):
    """What an attentive head, fitted on Labelled `train`, says of the clips `held_out`.

    The twenty of RATES x DECAYS are fitted on four fifths of the videos side by side, the best of
    them on the fifth is fitted again on all; without how.choose all twenty are, and answer.
    how  Fitting
    Returns probabilities of classes float32 [m, max(y) + 1], or values [m, K]; of all twenty with
    their number in front, rates the slower.
    """
    random = np.random.default_rng(how.seed)
    is_class = np.issubdtype(train.y.dtype, np.integer)
    centre, spread = 0.0, 1.0
    if not is_class:
        values = np.ma.masked_invalid(train.y)
        centre, spread = values.mean(0).filled(np.nan), values.std(0).clip(1e-6).filled(np.nan)
    y = torch.from_numpy(train.y if is_class else ((train.y - centre) / spread).astype(np.float32))
    y = y.long() if is_class else y
    videos = random.permutation(np.unique(train.videos))
    chosen_by = np.isin(train.videos, videos[: max(1, len(videos) // 5)])
    dim, out = features.sources[name].dim, int(y.max()) + 1 if is_class else y.shape[1]

    def fitted(rows, rates, decays):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            if how.depth == 1:
                grid = features.sources[name].grid
                bank = AttentiveBank(len(rates), dim, out, BANK_HEADS, grid).to(device)
            else:
                bank = PoolerBank(len(rates), dim, out, how.depth, how.heads).to(device)
        steps = max(how.least_steps, how.epochs * -(-len(rows) // how.batch_size))
        each = torch.tensor(rates, device=device), torch.tensor(decays, device=device)
        numbers, size = train.numbers[rows], min(how.batch_size, len(rows))
        train_bank(bank, features, name, numbers, y[rows], *each, steps, size, random, device)
        return bank

    rates, decays = zip(*[(rate, decay) for rate in RATES for decay in DECAYS])
    answering = slice(0, len(rates) if not how.choose else 1)
    if how.choose and len(videos) > 1:
        bank = fitted(np.flatnonzero(~chosen_by), rates, decays)
        rows = np.flatnonzero(chosen_by)
        said = answers_of(bank, features, name, train.numbers[rows], device)
        best = int(errors_of(said, y[rows]).mean(1).nan_to_num(math.inf).argmin())
        answering = slice(best, best + 1)
        del bank
    bank = fitted(np.arange(len(train.numbers)), rates[answering], decays[answering])
    said = answers_of(bank, features, name, held_out, device)
    said = said.softmax(-1).numpy() if is_class else said.numpy() * spread + centre
    return said[0] if how.choose else said


class Labelled(NamedTuple):
    """Clips of Features with what is to be read from them."""

    numbers: np.ndarray  # int64 [n]: of the clips; [n, S]: of S each that are read as one
    y: np.ndarray  # int64 [n] classes, or float32 [n, K] values, nan where one is missing
    videos: np.ndarray  # int64 [n]: clips of one stay together, and are a unit of intervals

    def of(self, rows):
        return Labelled(self.numbers[rows], self.y[rows], self.videos[rows])


class Fitting(NamedTuple):
    """How heads are fitted."""

    strengths: tuple = STRENGTHS  # of linear ones
    folds: int = 5
    epochs: int = 20  # of attentive ones
    batch_size: int = 16
    least_steps: int = 200
    seed: int = 0
    depth: int = 1  # of attentive ones: 1, an AttentiveBank; more, AttentivePoolers
    heads: int = 16  # of attention, of AttentivePoolers
    choose: bool = True  # among RATES x DECAYS by a fifth of the training videos; else none is


DEFAULTS = Fitting()


def answers(features, name, head, train, held_out, how=DEFAULTS, device="cpu"):
    """What a head, fitted on Labelled `train`, says of the clips `held_out` int64 [m] or [m, S]:
    probabilities of classes, or values, see fit_linear and fit_attentive.
    """
    if head == "attentive":
        return fit_attentive(features, name, train, held_out, how, device)
    x = features.pooled(name, head, train.numbers)
    y, videos = train.y, train.videos
    return fit_linear(x, y, videos, features.pooled(name, head, held_out), how.strengths, how.folds)


def probe(features, name, head, train, held_out, how=DEFAULTS, device="cpu"):
    """The same, with classes int64 [m] for their probabilities."""
    said = answers(features, name, head, train, held_out, how, device)
    return said.argmax(-1) if np.issubdtype(train.y.dtype, np.integer) else said
