"""Windows are pure functions of (seed, epoch, sample), and are what the papers say."""

from dataclasses import replace

import numpy as np
import pytest

from resnet_dist.config import DataConfig
from resnet_dist.data.view.augment import (
    PCA_COMPONENTS,
    PCA_SPREAD,
    eval_windows,
    train_windows,
    whole_sizes,
    whole_windows,
)
from resnet_dist.draws import uniforms

SCALE = DataConfig(train_crop="scale")
RANDOM_RESIZED = DataConfig(train_crop="random_resized")
PAD = DataConfig(format="cifar10", train_crop="pad", crop_px=32)


def random_sizes(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(40, 2500, (count, 2)).astype(np.int32)


def test_uniforms_are_uniform_and_independent() -> None:
    u = uniforms("window", 1, 2, np.arange(20_000), draws=4)
    assert (u >= 0).all()
    assert (u < 1).all()
    histogram = np.histogram(u, bins=20, range=(0, 1))[0] / u.size
    assert np.abs(histogram - 0.05).max() < 0.003
    correlation = np.corrcoef(u.T)
    assert np.abs(correlation - np.eye(4)).max() < 0.03
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


def test_every_part_of_the_key_counts() -> None:
    samples = np.arange(1000)
    base = uniforms("window", 1, 2, samples, 3)
    for other in (
        uniforms("window", 2, 2, samples, 3),
        uniforms("window", 1, 3, samples, 3),
        uniforms("window", 2, 1, samples, 3),
    ):
        assert not (other == base).any()
    assert np.array_equal(uniforms("window", 1, 2, samples, 8)[:, :3], base)


def test_golden_draws() -> None:
    """A change here is a change of every run that is to be resumed."""
    drawn = uniforms("window", 7, 3, np.array([0, 1_281_166]), draws=2)
    assert drawn.tolist() == [
        [0.07775385112142719, 0.15470112768570066],
        [0.1967202999022365, 0.8807310623868335],
    ]


@pytest.mark.parametrize("data", [SCALE, RANDOM_RESIZED, PAD])
def test_a_window_belongs_to_its_sample_not_to_its_batch(data: DataConfig) -> None:
    sizes = np.full((50, 2), 32, np.int32) if data is PAD else random_sizes(50)
    samples = np.arange(100, 150)
    together = train_windows(data, 1, 2, samples, sizes)
    for i in np.random.default_rng(0).permutation(50):
        alone = train_windows(data, 1, 2, samples[i : i + 1], sizes[i : i + 1])
        assert np.array_equal(alone.roi[0], together.roi[i])
        assert alone.flip[0] == together.flip[i]
    assert 0.2 < together.flip.mean() < 0.8
    later = train_windows(data, 1, 3, samples, sizes)
    assert (later.roi != together.roi).any(axis=1).mean() > 0.9


def test_scale_augmentation_is_a_224_crop_of_the_resized_image() -> None:
    sizes = 1000 * random_sizes(5000)  # so large that the rounding to whole pixels plays no part
    windows = train_windows(SCALE, 0, 0, np.arange(5000), sizes)
    roi = windows.roi
    assert windows.cut_first
    assert np.array_equal(roi, np.rint(roi))
    assert (roi[:, :2] >= 0).all()
    assert (roi[:, 2:] <= sizes + 1e-9).all()
    shorter = sizes.min(axis=1)
    side = np.where(sizes[:, 0] <= sizes[:, 1], roi[:, 2] - roi[:, 0], roi[:, 3] - roi[:, 1])
    resized_shorter = 224 * shorter / side  # what the shorter side was resized to
    whole = np.rint(resized_shorter)
    assert np.abs(resized_shorter - whole).max() < 0.05
    assert (whole.min(), whole.max()) == (256, 480)
    counts = np.bincount(whole.astype(int))[256:]
    assert len(counts) == 225
    assert abs(whole.mean() - 368) < 4  # uniform in [256, 480]
    # The corner is a whole pixel of the resized image: crops are uniform over what fits.
    corner = roi[:, :2] * np.floor(whole[:, None] * sizes / shorter[:, None] + 1e-9) / sizes
    assert np.abs(corner - np.rint(corner)).max() < 0.05


def test_scale_augmentation_of_tiny_images() -> None:
    sizes = np.array([[1, 1], [1, 500], [3, 2], [224, 224]])
    for epoch in range(20):
        roi = train_windows(SCALE, 0, epoch, np.arange(4), sizes).roi
        assert (roi[:, :2] >= 0).all()
        assert (roi[:, 2:] <= sizes).all()
        assert (roi[:, 2:] - roi[:, :2] >= 1).all()


def test_random_resized_crop_has_legal_areas_and_aspects() -> None:
    sizes = np.tile(np.array([[375, 500]], np.int32), (20_000, 1))
    roi = train_windows(RANDOM_RESIZED, 0, 0, np.arange(20_000), sizes).roi
    height, width = (roi[:, 2:] - roi[:, :2]).T
    assert (roi == np.rint(roi)).all()
    assert (roi[:, :2] >= 0).all()
    assert (roi[:, 2:] <= sizes).all()
    area, aspect = height * width / (375 * 500), width / height
    assert 0.078 < area.min() < 0.09
    assert 0.98 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    small = area < 0.45  # of these none was too wide or too high and drawn again
    assert abs(np.log(aspect[small]).mean()) < 0.01  # log-uniform: the same up and down


def test_random_resized_crop_of_a_strip_falls_back_to_the_centre() -> None:
    sizes = np.array([[10, 1000], [1000, 10], [1, 1]], np.int32)
    roi = train_windows(RANDOM_RESIZED, 0, 0, np.arange(3), sizes).roi
    assert roi.tolist() == [[0, 493, 10, 506], [493, 0, 506, 10], [0, 0, 1, 1]]


def test_pad_crop_reaches_all_81_places() -> None:
    sizes = np.full((5000, 2), 32, np.int32)
    roi = train_windows(PAD, 0, 0, np.arange(5000), sizes).roi
    assert (roi[:, 2:] - roi[:, :2] == 32).all()
    places = {tuple(corner) for corner in roi[:, :2].tolist()}
    assert places == {(y, x) for y in range(-4, 5) for x in range(-4, 5)}


def test_no_flip_when_the_config_says_so() -> None:
    data = DataConfig(flip=False)
    assert not train_windows(data, 0, 0, np.arange(100), random_sizes(100)).flip.any()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [  # resize 256 then centre 224, in the original's pixels
        (256, 256, [16, 16, 240, 240]),
        (512, 512, [32, 32, 480, 480]),
        (256, 342, [16, 59, 240, 283]),
        (342, 256, [59, 16, 283, 240]),
    ],
)
def test_evaluation_window(height: int, width: int, expected: list[float]) -> None:
    windows = eval_windows(DataConfig(), np.array([[height, width]], np.int32))
    assert windows.roi[0].tolist() == expected
    assert not windows.flip[0]


def test_pca_colour_by_hand() -> None:
    """Krizhevsky et al. 2012, section 4.1: each component times its spread times N(0, 0.1)."""
    data = replace(SCALE, pca_color_std=0.1)
    samples, sizes = np.arange(40_000), random_sizes(40_000)
    shift = train_windows(data, 0, 0, samples, sizes).color_shift
    assert np.allclose(PCA_COMPONENTS.T @ PCA_COMPONENTS, np.eye(3), atol=2e-3)
    along = shift @ PCA_COMPONENTS  # [B, 3]
    assert along.mean(0) == pytest.approx(0, abs=2e-4)
    assert along.std(0) == pytest.approx(0.1 * PCA_SPREAD, rel=0.02)
    assert np.corrcoef(along.T) == pytest.approx(np.eye(3), abs=0.02)
    # Normal, not uniform: 4.6 % beyond two deviations.
    assert (np.abs(along[:, 0]) > 2 * 0.1 * PCA_SPREAD[0]).mean() == pytest.approx(0.0455, abs=5e-3)
    # The crops and mirrors are those of the run without it, and evaluation has none.
    plain = train_windows(SCALE, 0, 0, samples, sizes)
    assert np.array_equal(plain.roi, train_windows(data, 0, 0, samples, sizes).roi)
    assert not plain.color_shift.any()
    assert not eval_windows(data, sizes).color_shift.any()


def test_of_a_strip_the_central_part_is_a_whole_image() -> None:
    sizes = np.array([[1, 60000], [60000, 1], [3, 48], [400, 500]])
    assert whole_sizes(sizes).tolist() == [[1, 16], [16, 1], [3, 48], [400, 500]]
    strip = whole_windows(sizes[:1], 640)
    assert strip.size_px == (640, 10240)
    assert strip.roi.tolist() == [[0, 29992, 1, 30008]]
    assert whole_windows(sizes[3:], 640).roi.tolist() == [[0, 0, 400, 500]]
