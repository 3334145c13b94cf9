"""The random numbers are Philox words by counter, mapped to values by integer arithmetic."""

from __future__ import annotations

from statistics import NormalDist

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_service.data import draws
from loader_service.data.augment import complete_view
from loader_service.data.draws import draw, exact_shift, normal_quantiles, position_words, raw_words, round_shift, scale
from loader_service.data.manifest import Statistics
from loader_service.types import VIEWS, View

MASK = 2**64 - 1
words = st.integers(0, MASK)


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Return one block of Philox 4x64-10 as Salmon et al. (2011) describe it, in plain integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


@pytest.fixture(scope="module")
def train(statistics: Statistics) -> View:
    return complete_view(View(), statistics)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
        ),
        (
            (MASK, MASK, MASK, MASK),
            (MASK, MASK),
            [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
        ),
    ],
)
def test_the_reference_is_philox(counter: tuple[int, ...], key: tuple[int, ...], answer: list[int]) -> None:
    """The tests' own Philox gives the known answers that its authors publish with Random123."""
    assert philox(counter, key) == answer


@given(seed=words, epoch=words, stream=st.integers(0, 2), start=st.integers(0, 2**50), blocks=st.integers(0, 3))
def test_words_are_philox_words(seed: int, epoch: int, stream: int, start: int, blocks: int) -> None:
    """Block b of a stream is Philox of counter (b + 1, 0, stream, 0) under the key (seed, epoch)."""
    expected = [w for b in range(blocks) for w in philox((start + b + 1, 0, stream, 0), (seed, epoch))]
    assert raw_words(seed, epoch, stream, start, 4 * blocks).tolist() == expected


def test_golden_words() -> None:
    """Position 7 of (seed 2012, epoch 60) owns these words of the augmentation stream."""
    assert [f"{w:016x}" for w in position_words(2012, 60, draws.STREAM_AUGMENT, 7, 1)[0, :6].tolist()] == [
        "b569a2fb48d63d66",
        "ba2dd3019f40fd87",
        "64c0e0480b13e84b",
        "f21e6dc2f440c893",
        "7220e81dd616520c",
        "54f66e1b73d4dd30",
    ]


def test_golden_draws(train: View) -> None:
    """Positions 0 to 3 of (seed 2012, epoch 60) get these crops, flips and colour shifts."""
    got = [(int(d["y"]), int(d["x"]), bool(d["flip"]), d["shift"].tolist()) for d in draw(train, 2012, 60, 0, 4)]
    assert got == [
        (4, 23, True, [-3, -3, -2]),
        (3, 17, False, [0, 0, 0]),
        (1, 9, False, [0, 0, -1]),
        (23, 2, False, [1, 1, 1]),
    ]


@given(seed=words, epoch=words, start=st.integers(0, 2**40), n=st.integers(0, 40), data=st.data())
def test_a_draw_does_not_depend_on_the_cut(seed: int, epoch: int, start: int, n: int, data: st.DataObject) -> None:
    """A position's draws do not depend on the slices that an epoch is cut into."""
    view = View(basis=(20.0, 1.0, 0.0, 20.0, 0.0, -1.0, 20.0, -1.0, 1.0))
    cut = data.draw(st.integers(0, n))
    first, second = draw(view, seed, epoch, start, cut), draw(view, seed, epoch, start + cut, n - cut)
    assert first.tobytes() + second.tobytes() == draw(view, seed, epoch, start, n).tobytes()


def test_crops_cover_all_places_evenly(train: View) -> None:
    """All 33 x 33 crop positions are equally likely (chi-square, 1088 degrees of freedom)."""
    n = 200_000
    drawn = draw(train, 5, 0, 0, n)
    places = np.bincount(drawn["y"].astype(int) * 33 + drawn["x"], minlength=33 * 33)
    assert places.size == 33 * 33
    statistic = ((places - n / 1089) ** 2).sum() / (n / 1089)
    assert abs(statistic - 1088) < 4 * np.sqrt(2 * 1088)


def test_half_are_flipped_whatever_the_crop(train: View) -> None:
    """Half of the samples are mirrored, independently of the crop."""
    drawn = draw(train, 5, 1, 0, 100_000)
    assert drawn["flip"].mean() == pytest.approx(0.5, abs=0.006)
    assert drawn["flip"][drawn["y"] > 16].mean() == pytest.approx(0.5, abs=0.01)


def test_shifts_have_the_covariance_of_the_eigenvectors(train: View, statistics: Statistics) -> None:
    """Before rounding, shifts vary as sum_k (0.1 lambda_k)^2 p_k p_k^T, in grey levels (paper section 4.1)."""
    n = 400_000
    alphas = position_words(6, 0, draws.STREAM_AUGMENT, 0, n)[:, draws.WORD_ALPHA]
    shifts = exact_shift(train, alphas) / 2.0**32
    scaled = 255 * 0.1 * statistics.eigenvectors * statistics.eigenvalues
    expected = scaled @ scaled.T
    assert np.allclose(shifts.mean(axis=0), 0, atol=4 * 5.9 / np.sqrt(n))
    assert np.allclose(np.cov(shifts.T), expected, atol=0.01 * expected.max())


def test_the_jitter_of_a_sample_is_one_for_all_three_channels(train: View) -> None:
    """Along the second and third eigenvector, shifts vary in proportion to the eigenvalues."""
    drawn = draw(train, 6, 0, 0, 50_000)["shift"].astype(float)
    assert drawn[:, 0].std() == pytest.approx(3.3, rel=0.05)
    assert np.corrcoef(drawn[:, 0], drawn[:, 2])[0, 1] > 0.9


def test_shifts_round_half_to_even_and_saturate() -> None:
    """Shifts are rounded to nearest, halves to even, and saturate at 255."""
    one = 2**32
    exact = np.array(
        [one // 2, 3 * one // 2, -one // 2, -3 * one // 2, one // 2 + 1, -one // 2 - 1, 300 * one, -(2**60)]
    )
    assert round_shift(exact).tolist() == [0, 2, 0, -2, 1, -1, 255, -255]


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20))
def test_rounding_is_that_of_exact_fractions(exact: list[int]) -> None:
    """Integer rounding agrees with Python's rounding of exact doubles (2**-32 units below 2**40 are exact)."""
    expected = [max(-255, min(255, round(v / 2**32))) for v in exact]
    assert round_shift(np.array(exact)).tolist() == expected


def test_quantiles_are_the_normal_distributions() -> None:
    """Each entry is the quantile at (i + 1/2) / 2**14, as the distribution function confirms by another algorithm."""
    table, cdf = normal_quantiles().tolist(), NormalDist().cdf
    assert len(table) == 2**14
    for i, quantile in enumerate(table):
        assert cdf((quantile - 0.5001) / 2**16) < (i + 0.5) / 2**14 < cdf((quantile + 0.5001) / 2**16)


def test_no_quantile_is_near_a_rounding_boundary() -> None:
    """A difference in the last bit between two libms cannot change an entry."""
    exact = [NormalDist().inv_cdf((i + 0.5) / 2**14) * 2**16 for i in range(2**13, 2**14)]
    assert min(abs(v - np.floor(v) - 0.5) for v in exact) > 1e-6


def test_quantiles_are_antisymmetric_and_fixed() -> None:
    """The table has a mean of exactly zero and nearly unit variance, and is read-only."""
    table = normal_quantiles()
    assert np.array_equal(table, -table[::-1])
    assert (table / 2**16).std() == pytest.approx(1, abs=1e-3)
    assert not table.flags.writeable


@given(st.lists(words, min_size=1, max_size=20), st.integers(1, 256))
def test_scaling_is_exact_multiplication(values: list[int], n: int) -> None:
    """A word is scaled to its high half, as a fraction of 2**32, times n, rounded down."""
    assert scale(np.array(values, np.uint64), n).tolist() == [(v >> 32) * n >> 32 for v in values]


def test_seed_and_epoch_are_not_added(train: View) -> None:
    """Seed 0 in epoch 1 and seed 1 in epoch 0 draw different samples."""
    assert draw(train, 0, 1, 0, 50).tobytes() != draw(train, 1, 0, 0, 50).tobytes()


def test_streams_are_separate() -> None:
    """Streams share no words."""
    streams = [raw_words(0, 0, stream, 0, 256) for stream in range(3)]
    assert np.unique(np.concatenate(streams)).size == 3 * 256


def test_switching_one_draw_off_moves_no_other(train: View) -> None:
    """Without flip or jitter a sample keeps its crop."""
    plain = draw(msgspec.structs.replace(train, flip=False, jitter=0.0), 1, 2, 3, 100)
    full = draw(train, 1, 2, 3, 100)
    assert np.array_equal(plain["y"], full["y"])
    assert np.array_equal(plain["x"], full["x"])
    assert not plain["flip"].any()
    assert not plain["shift"].any()
    assert full["flip"].any()
    assert full["shift"].any()


def test_the_centre_view_is_the_centre() -> None:
    """The centre crop of 224 in 256 starts at row and column 16."""
    assert [tuple(d) for d in draw(VIEWS["center"], 9, 9, 0, 2)[["y", "x", "flip"]].tolist()] == [(16, 16, False)] * 2


def test_the_ten_crops() -> None:
    """Four corners and the centre, then the same mirrored (paper section 4.1)."""
    drawn = draw(VIEWS["ten-crop"], 9, 9, 0, 3)
    five = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    assert drawn.shape == (3, 10)
    for sample in drawn:
        assert list(zip(sample["y"].tolist(), sample["x"].tolist(), strict=True)) == five * 2
        assert sample["flip"].tolist() == [False] * 5 + [True] * 5


def test_the_whole_view_draws_nothing() -> None:
    """The draws of the whole view are all zero: origin, no flip, no shift."""
    assert not any(draw(VIEWS["whole"], 9, 9, 5, 2).tobytes())


def test_jitter_needs_its_basis() -> None:
    """A view without its jitter basis is refused instead of drawn without jitter."""
    with pytest.raises(ValueError, match="basis"):
        draw(View(), 0, 0, 0, 1)
