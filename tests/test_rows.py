"""The data path's own ops: rows out of files, patches, moments and the order of clips, against
numpy.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salt import ops
from salt.masks import STREAMS, Random, permute, permute_reference
from salt.rows import File, RowError, advise, read_rows

needs_extension = pytest.mark.skipif(
    not ops.EXTENSION["devices"], reason="the extension is not built"
)


@pytest.fixture(params=["extension", "reference"])
def either(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(ops, "EXTENSION", {**ops.EXTENSION, "devices": []})
    elif not ops.EXTENSION["devices"]:
        pytest.skip("the extension is not built")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A file of 5 records of 900 rows of 77 bytes, after 130 bytes of something else."""
    path = tmp_path_factory.mktemp("rows") / "f"
    content = np.random.default_rng(0).integers(0, 256, 130 + 5 * 900 * 77, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    return str(path), content[130:].reshape(5, 900, 77)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_rows_come_to_their_places(either, records, threads, share):
    path, content = records
    order, file = [3, 0, 3, 4], File(path)
    wanted = torch.from_numpy(np.random.default_rng(1).random((4, 900)) < share)
    out = torch.full((4, 900, 77), 7, dtype=torch.uint8)
    read_rows([file] * 4, [130 + r * 900 * 77 for r in order], out, 77, wanted, threads=threads)
    assert (
        np.array_equal(out[wanted], torch.from_numpy(content[order])[wanted])
        and (out[~wanted] == 7).all()
    )
    read_rows([file] * 4, [130 + r * 900 * 77 for r in order], out, 77, threads=threads)
    assert np.array_equal(out, content[order])
    advise([file], [0], 1000)


@pytest.mark.parametrize("row_bytes", [64, 1536, 1540, 3])
def test_rows_of_any_width(either, tmp_path, row_bytes):
    content = np.random.default_rng(row_bytes).integers(0, 256, (50, row_bytes), dtype=np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    memory = torch.zeros(1 + 50 * row_bytes, dtype=torch.uint8)
    for offset in (0, 1):  # aligned for wide stores, and not
        out = memory[offset : offset + 50 * row_bytes].view(1, 50, row_bytes)
        read_rows([File(str(tmp_path / "f"))], [0], out, row_bytes)
        assert np.array_equal(out[0], content)


def test_what_lies_beyond_the_map_is_read_without_it(either, records, tmp_path):
    """A file that has grown since it was opened: the plain way of reading, which other systems take
    for every row.
    """
    path, content = tmp_path / "f", records[1].reshape(-1, 77)
    path.write_bytes(content[:100].tobytes())
    file = File(str(path))
    with open(path, "ab") as more:
        more.write(content[100:].tobytes())
    wanted = torch.from_numpy(np.random.default_rng(2).random((1, 4500)) < 0.4)
    out = torch.zeros(1, 4500, 77, dtype=torch.uint8)
    read_rows([file], [0], out, 77, wanted, threads=2)
    assert (
        np.array_equal(out[wanted], torch.from_numpy(content)[wanted[0]])
        and (out[~wanted] == 0).all()
    )


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_what_memory_holds_is_known_to_whom_it_is_told(tmp_path):
    path = tmp_path / "f"
    content = np.random.default_rng(3).integers(0, 256, (6000, 1024), dtype=np.uint8)
    with open(path, "wb") as written:
        written.write(content.tobytes())
        os.fsync(written.fileno())  # or it could not be forgotten
    file, out = File(str(path)), torch.zeros(1, 6000, 1024, dtype=torch.uint8)
    for _ in range(2):
        out.zero_()
        read_rows([file], [0], out, 1024)
        assert np.array_equal(out[0], content)
        assert file.resident(0, content.nbytes) and file.resident(5, content.nbytes - 4097)
        assert not file.resident(0, content.nbytes + 1)  # past its end
        del file  # what is mapped stays
        with open(path, "rb") as read:
            os.posix_fadvise(read.fileno(), 4_000_000, 0, os.POSIX_FADV_DONTNEED)
        file = File(str(path))
        if file.resident(0, content.nbytes):
            pytest.skip("this file system keeps its files in memory")
        assert file.resident(0, 2_000_000)
    if os.geteuid() == 0:
        assert file.resident(0, 4096)
        os.seteuid(65534)  # a stranger, whom Linux tells that every page is there
        try:
            assert not file.resident(0, 4096)
            read_rows([file], [0], out.zero_(), 1024)
        finally:
            os.seteuid(0)
        assert np.array_equal(out[0], content)


def test_errors_say_which_row(either, records, tmp_path):
    path, content = tmp_path / "f", records[1]
    path.write_bytes(content.tobytes())
    file = File(str(path))
    os.truncate(path, 2 * 900 * 77 + 400 * 77 + 5)  # in the third record's row 400
    out = torch.zeros(3, 900, 77, dtype=torch.uint8)
    wanted = torch.zeros(3, 900, dtype=torch.bool)
    wanted[:, 400] = wanted[:, 20] = True
    with pytest.raises(RowError, match="truncated") as caught:
        read_rows([file] * 3, [0, 900 * 77, 2 * 900 * 77], out, 77, wanted)
    # the first row of the piece that could not be read whole
    assert caught.value.record == 2 and caught.value.row in (20, 400)
    with pytest.raises(OSError, match="No such file"):
        File(str(tmp_path / "nothing"))


@needs_extension
def test_the_systems_own_error_arrives(tmp_path):
    # opens, and cannot be read
    with pytest.raises(RowError, match="record 0, row 0: Is a directory"):
        read_rows([File(str(tmp_path))], [0], torch.zeros(1, 3, 8, dtype=torch.uint8), 8)


@needs_extension
@pytest.mark.parametrize(
    "change, message",
    [
        ({"wanted": torch.zeros(1, 3, dtype=torch.bool)}, "wanted has shape"),
        ({"row_bytes": 9}, "do not fit out"),
        ({"starts": [0]}, "out has shape"),
        ({"starts": [-1, 0]}, "at least 0"),
        ({"out": torch.zeros(2, 8, 4, dtype=torch.uint8).transpose(1, 2)}, "contiguous"),
        ({"scale": torch.zeros(2, 8)}, "do not fit out"),
    ],
)
def test_calls_that_do_not_fit_are_an_error(records, change, message):
    call = {
        "files": [File(records[0])] * 2,
        "starts": [0, 0],
        "out": torch.zeros(2, 4, 8, dtype=torch.uint8),
        "row_bytes": 8,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        read_rows(**call)


def test_int8_rows_times_the_scales_of_channel_and_token(either, tmp_path):
    random = np.random.default_rng(3)
    entries = random.integers(-127, 128, (2, 5, 37), dtype=np.int8)
    scale, tokens = (
        torch.from_numpy(random.uniform(0.01, 3, (2, n)).astype(np.float32)) for n in (37, 5)
    )
    (tmp_path / "f").write_bytes(entries.tobytes())
    wanted = torch.from_numpy(random.random((2, 5)) < 0.7)
    out = torch.full((2, 5, 37), -1.0, dtype=torch.float16)
    read_rows([File(str(tmp_path / "f"))] * 2, [0, 5 * 37], out, 37, wanted, scale, tokens=tokens)
    expected = (torch.from_numpy(entries).float() * scale[:, None] * tokens[:, :, None]).half()
    assert torch.equal(
        out, torch.where(wanted[:, :, None], expected, torch.tensor(-1.0, dtype=torch.float16))
    )


def test_int8_rows_times_their_scale(either, tmp_path):
    """Every kind of float16: normal, subnormal, ties, zero, beyond the range."""
    rng = np.random.default_rng(3)
    exponents = rng.integers(-30, 20, 4096)
    scale = np.ldexp(
        rng.integers(1 << 23, 1 << 24, 4096).astype(np.float64), exponents - 23
    ).astype(np.float32)
    # halfway between two float16
    scale[:1024] = np.ldexp(
        (2 * rng.integers(1024, 2048, 1024) + 1).astype(np.float64), exponents[:1024] - 12
    ).astype(np.float32)
    entries = rng.integers(-128, 128, (6, 4096)).astype(np.int8)
    (tmp_path / "f").write_bytes(entries.tobytes())
    out = torch.zeros(2, 3, 4096, dtype=torch.float16)
    scales = torch.from_numpy(np.stack([scale, scale[::-1].copy()]))
    read_rows([File(str(tmp_path / "f"))] * 2, [0, 3 * 4096], out, 4096, scale=scales)
    expected = (torch.from_numpy(entries).view(2, 3, 4096).float() * scales[:, None]).half()
    assert (
        torch.equal(out.view(torch.int16), expected.view(torch.int16))
        and expected.isinf().any()
        and (expected.abs() < 6e-5).any()
    )


@pytest.mark.parametrize(
    "shape, patch, tubelet",
    [((4, 32, 48, 3), 16, 2), ((2, 28, 14, 3), 14, 1), ((6, 10, 15, 3), 5, 3)],
)
def test_patchify_into(either, shape, patch, tubelet):
    clip = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.stack(
        [  # token by token, as ops.patchify says
            clip[
                t * tubelet : (t + 1) * tubelet,
                y * patch : (y + 1) * patch,
                x * patch : (x + 1) * patch,
            ]
            .transpose(3, 0, 1, 2)
            .reshape(-1)
            for t in range(shape[0] // tubelet)
            for y in range(shape[1] // patch)
            for x in range(shape[2] // patch)
        ]
    )
    out = np.zeros_like(expected)
    ops.patchify_into(clip[::-1][::-1], out, patch, tubelet)
    assert np.array_equal(out, expected)
    with pytest.raises((RuntimeError, ValueError)):
        ops.patchify_into(clip, np.zeros((3, 7), np.uint8), patch, tubelet)


@given(st.integers(1, 9), st.integers(1, 1500), st.integers(0, 9), st.integers(0, 2**32))
def test_moments_are_numpys_in_however_many_calls(rows, width, split, seed):
    values = np.random.default_rng(seed).normal(0, 30, (rows, width)).astype(np.float16)
    total, squares = np.zeros(width), np.zeros(width)
    for part in np.split(values, [min(split, rows)]):
        ops.add_moments(part, total, squares)
    expected, expected_squares = np.zeros(width), np.zeros(width)
    for row in values.astype(np.float64):
        expected, expected_squares = expected + row, expected_squares + row * row
    assert np.array_equal(total, expected) and np.array_equal(squares, expected_squares)


# -------------------------------------------------------------------------------------------- order


def plain_order(index, n, seed, epoch):
    random = Random(seed, epoch, n, STREAMS["order"])
    if n > 256:
        return permute_reference(index, n, np.array([random.next() for _ in range(8)], np.uint64))
    keys = [(random.next() << 32) + random.next() for _ in range(n)]
    return np.array(sorted(range(n), key=keys.__getitem__))[index]


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1))
def test_a_permutation_takes_each_number_once(n, seed, epoch):
    image = permute(np.arange(n), n, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(n))
    assert np.array_equal(image, plain_order(np.arange(n), n, seed, epoch))


@given(st.integers(1, 2**62), st.integers(0, 2**63 - 1))
def test_permutations_of_any_size(n, seed):
    index = np.unique(np.random.default_rng(seed).integers(0, n, 50))
    image = permute(index, n, seed, 1)
    assert len(np.unique(image)) == len(index) and image.min() >= 0 and image.max() < n
    assert np.array_equal(image, plain_order(index, n, seed, 1))


@pytest.mark.parametrize("n", [3, 5, 6, 7, 24, 1000])
def test_every_record_comes_at_every_place_equally_often(n):
    """chi-squared over places and values in 4000 epochs; 5 standard deviations."""
    epochs, places = 4000, min(n, 24)
    images = np.stack([permute(np.arange(places), n, 11, epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(images[:, place], minlength=n) for place in range(places)])
    freedom = places * (n - 1)
    assert abs(((counts - epochs / n) ** 2).sum() * n / epochs - freedom) < 5 * (2 * freedom) ** 0.5
    # neighbours in order are neighbours in number no more than others
    steps = np.bincount((images[:, 1] - images[:, 0]) % n, minlength=n)[1:]
    assert (
        abs(((steps - epochs / (n - 1)) ** 2).sum() * (n - 1) / epochs - (n - 2))
        < 5 * (2 * (n - 2)) ** 0.5
    )


def test_an_index_out_of_range_is_an_error():
    for index in ([5], [-1]):
        with pytest.raises(IndexError, match=r"must be in \[0, 5\)"):
            permute(np.array(index), 5, 0, 0)


@needs_extension
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_less_simd_gives_the_same_bits(level):
    this = f"{os.path.dirname(os.path.abspath(__file__))}/test_rows.py"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            this,
            "-k",
            "int8 or patchify or moments or each_number or any_width",
        ],
        env={**os.environ, "SALT_SIMD": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]
