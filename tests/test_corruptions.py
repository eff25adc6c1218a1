"""Corrupted images: what is done to them, and on which numbers it depends.

All but frost were compared, on 60 photographs of 32 x 32 pixels with the same random draws, with
the code that made the published files (with OpenCV, scikit-image and ImageMagick, which are not
needed here): at every severity no pixel differs by more than 2 levels of 255 (elastic_transform: 4,
0.13 on average, since OpenCV warps in steps of 1/32 pixel). The checksums below hold that result.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images
from torch import Tensor

from analysis import corruptions as picture
from ray_subnets import datasets
from ray_subnets.shifts import blurs, corruptions, distortions, weather
from ray_subnets.shifts.corruptions import EXTRA, NAMES, SEVERITIES, corrupt

ALL = NAMES + EXTRA


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """`(24, 3, 32, 32)` pieces of two photographs."""
    found = []
    for photograph in load_sample_images().images:
        for i in range(12):
            top, left = 100 * (i // 4), 150 * (i % 4)
            piece = Image.fromarray(photograph[top : top + 128, left : left + 128])
            found.append(np.asarray(piece.resize((32, 32), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def grey() -> Tensor:
    return datasets.load("digits").test.images[:24]


def draws(count: int) -> list[np.random.Generator]:
    return [np.random.Generator(np.random.SFC64(i)) for i in range(count)]


def as_array(images: Tensor) -> np.ndarray:
    return images.numpy() / 255


# --- all of them --------------------------------------------------------------------------------


def test_the_published_names() -> None:
    """15 and 4, named as the files are."""
    assert (len(NAMES), len(EXTRA), len(set(ALL))) == (15, 4, 19)
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 20), (3, 48, 40)])
def test_any_size_grey_or_colour(shape: tuple[int, ...]) -> None:
    """Same shape and type, the input untouched, and something changes at severity 5."""
    images = torch.randint(256, (3, *shape), generator=torch.Generator().manual_seed(0)).byte()
    before = images.clone()
    for name in ALL:
        for severity in SEVERITIES:
            result = corrupt(images, name, severity)
            assert result.shape == images.shape
            assert result.dtype == torch.uint8
        assert not torch.equal(result, images), name
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ALL)
def test_an_image_depends_on_seed_name_severity_and_row_only(
    name: str, photographs: Tensor
) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    whole = corrupt(photographs, name, 4)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # type: ignore[index] # noqa: NPY002
    assert torch.equal(corrupt(photographs, name, 4), whole)
    assert torch.equal(corrupt(photographs[:5], name, 4), whole[:5])
    rows = [7, 3]
    assert torch.equal(corrupt(photographs[rows], name, 4, rows=rows), whole[rows])
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    fixed |= {"gaussian_blur", "saturate"}
    twice = corrupt(photographs[[0, 0]], name, 4)
    assert torch.equal(twice[0], twice[1]) == (name in fixed)
    assert torch.equal(corrupt(photographs, name, 4, seed=1), whole) == (name in fixed)


def test_batches_change_nothing(photographs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images are worked on together."""
    whole = {name: corrupt(photographs[:6], name, 3) for name in ALL}
    monkeypatch.setattr(corruptions, "_AT_ONCE", 2 * 3 * 32 * 32)
    for name in ALL:
        assert torch.equal(corrupt(photographs[:6], name, 3), whole[name]), name


# More severe is not farther from the clean image in all of the published settings. The severities
# at which the root-mean-square distance falls, on photographs:
FALLS = {
    "glass_blur": (2, 3, 5),  # a stronger blur hides more of the same shuffling
    "motion_blur": (4,),  # a longer line, but weights that fall off as fast: 14.79 after 14.80
    "frost": (4,),  # less of the image, as much frost
    "elastic_transform": (2, 4, 5),  # smaller shifts of the whole, more within
    "saturate": (3,),  # from less colour to more
}


@pytest.mark.parametrize("name", ALL)
def test_severity_grows(name: str, photographs: Tensor) -> None:
    clean = photographs.double()
    far = [
        float((corrupt(photographs, name, severity).double() - clean).square().mean().sqrt())
        for severity in SEVERITIES
    ]
    falls = tuple(s for s in SEVERITIES[1:] if far[s - 1] <= far[s - 2])
    assert falls == FALLS.get(name, ()), far
    assert far[0] > 1


CHECKSUMS = {
    "gaussian_noise": "c715f67a3c91bcfd",
    "shot_noise": "42c75797a34e59ee",
    "impulse_noise": "b80ed689e2983bcd",
    "defocus_blur": "965c29c825d7f938",
    "glass_blur": "230a1a1b4bf54690",
    "motion_blur": "8dbc76e765e5b60a",
    "zoom_blur": "1f8a18266890195e",
    "snow": "fa0f0aa3d6acb3bd",
    "frost": "89bbc21f2bca35be",
    "fog": "955234afb402f108",
    "brightness": "ddcf12b05177f83b",
    "contrast": "0843466c65be8003",
    "elastic_transform": "4842bf4a67f5edd2",
    "pixelate": "7839d2ed90a4770e",
    "jpeg_compression": "c6780f87fc3cc707",
    "speckle_noise": "7a508621a8f8f822",
    "gaussian_blur": "f7d3d62ac634f841",
    "spatter": "79f1de3343e66682",
    "saturate": "1aa481b9467e74e2",
}


@pytest.mark.parametrize("name", ALL)
def test_the_same_numbers_on_every_machine(name: str, grey: Tensor) -> None:
    """Of all severities, in colour and in grey."""
    n, c, y, x = torch.meshgrid(*map(torch.arange, (4, 3, 32, 32)), indexing="ij")
    colour = ((37 * n + 3 * y * y + 5 * x * (c + 1)) % 256).byte()
    total = hashlib.sha256()
    for severity in SEVERITIES:
        for images in (colour, grey):
            total.update(corrupt(images, name, severity).numpy().tobytes())
    assert total.hexdigest()[:16] == CHECKSUMS[name]


# --- one by one ---------------------------------------------------------------------------------


def middle(value: float = 0.5) -> np.ndarray:
    return np.full((40, 1, 32, 32), value)


def test_noise_has_the_published_strength() -> None:
    """Standard deviations and fractions over 40,960 values."""
    x, random = middle(), draws(40)
    assert (distortions.gaussian_noise(x, random, 0.1) - x).std() == pytest.approx(0.1, rel=0.02)
    assert (distortions.speckle_noise(x, random, 0.2) - x).std() == pytest.approx(0.1, rel=0.02)
    shot = distortions.shot_noise(x, random, 50)
    assert shot.mean() == pytest.approx(0.5, rel=0.01)
    assert shot.std() == pytest.approx((0.5 / 50) ** 0.5, rel=0.02)
    assert np.allclose(shot * 50, np.rint(shot * 50), rtol=0, atol=1e-9)
    salted = distortions.impulse_noise(x, random, 0.07)
    assert (salted == 0).mean() == pytest.approx(0.035, rel=0.1)
    assert (salted == 1).mean() == pytest.approx(0.035, rel=0.1)
    assert (salted == 0.5).mean() == pytest.approx(0.93, rel=0.01)


def test_blurs_of_a_point() -> None:
    """The kernels themselves: mass is kept, and has the published width."""
    x = np.zeros((1, 1, 33, 33))
    x[0, 0, 16, 16] = 1
    place = np.arange(33) - 16
    for sigma in (0.7, 1.0):
        blurred = blurs.gaussian_blur(x, draws(1), sigma)[0, 0]
        assert blurred.sum() == pytest.approx(1)
        scale = blurs.scale_of(x)
        assert (blurred.sum(0) * place**2).sum() == pytest.approx((sigma * scale) ** 2, rel=0.03)
    x = x[:, :, :32, :32]
    disk = blurs.defocus_blur(x, draws(1), (1.5, 0.1))[0, 0]
    assert np.allclose(disk[15:18, 15:18], 1 / 9)  # all within 1.5 pixels
    edge = np.exp(-1 / (2 * 0.4**2))
    cross = blurs.defocus_blur(x, draws(1), (0.3, 0.4))[0, 0]
    assert cross[16, 15:18] == pytest.approx(np.array([edge, 1, edge]) / (1 + 2 * edge) ** 2)


def test_streaks_by_hand() -> None:
    """A point moves left along a line, with the weights of half a Gaussian."""
    image = np.zeros((2, 1, 9, 9), dtype=np.uint8)
    image[:, 0, 4, 4] = 200
    weights = np.exp(-(np.arange(5) ** 2) / 8)
    expected = np.floor(200 * weights / weights.sum())
    result = blurs.streak(image, [0, -90], (2, 2), 1.0) * 255
    assert np.rint(result[0, 0, 4, 4::-1]).tolist() == expected.tolist()
    assert np.rint(result[1, 0, 4:, 4]).tolist() == expected.tolist()


def test_glass_takes_pixels_from_nearby(photographs: Tensor) -> None:
    """Up to one pixel up and left of it; the border stays."""
    x = as_array(photographs)
    result = np.rint(blurs.glass_blur(x, draws(24), (0.05, 1, 1)) * 255)
    source = photographs.numpy().astype(float)
    near = [np.roll(source, (a, b), (2, 3)) for a in (0, 1) for b in (0, 1)]
    same = np.stack([(result == other).all(1) for other in near])
    assert same.any(0).all()
    assert np.array_equal(result[:, :, :2], source[:, :, :2])
    assert (same[1:].any(0) & ~same[0]).mean() > 0.5


def test_enlarging_is_scipys(photographs: Tensor) -> None:
    """The matrices do what scipy's zoom does to the middle of an image."""
    x = as_array(photographs[:2])
    for factor in (1.0, 1.07, 1.25, 2.25):
        kept = int(np.ceil(32 / factor))
        start = (32 - kept) // 2
        part = x[:, :, start : start + kept, start : start + kept]
        zoomed = ndimage.zoom(part, (1, 1, factor, factor), order=1)
        cut = (zoomed.shape[2] - 32) // 2
        assert np.allclose(blurs.enlarge(x, factor), zoomed[:, :, cut : cut + 32, cut : cut + 32])
    factors = [1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06]  # the end belongs to it, by rounding
    mean = (x + sum(blurs.enlarge(x, factor) for factor in factors)) / 8
    assert np.allclose(blurs.zoom_blur(x, draws(2), 1.06), mean)


def test_colours_against_matplotlib(photographs: Tensor) -> None:
    """Hue, saturation and value, on photographs with black, grey and white pixels."""
    x = as_array(photographs)
    x[0, :, 0, :3] = np.array([0, 0.4, 1])
    hsv = rgb_to_hsv(x.transpose(0, 2, 3, 1))
    brighter = hsv.copy()
    brighter[..., 2] = np.clip(hsv[..., 2] + 0.2, 0, 1)
    expected = hsv_to_rgb(brighter).transpose(0, 3, 1, 2)
    assert np.allclose(distortions.brightness(x, [], 0.2), expected)
    for factor, more in ((0.1, 0), (2, 0.1)):
        tinted = hsv.copy()
        tinted[..., 1] = np.clip(hsv[..., 1] * factor + more, 0, 1)
        expected = hsv_to_rgb(tinted).transpose(0, 3, 1, 2)
        assert np.allclose(distortions.saturate(x, [], (factor, more)), expected)


def test_grey_is_the_luma_of_colour(grey: Tensor) -> None:
    """What draws the same for grey and colour does to a grey image what it does to three channels,
    but where one of them is at its end.
    """
    three = grey.expand(-1, 3, -1, -1)
    weights = torch.from_numpy(distortions.LUMA)[:, None, None]
    for name in ("brightness", "contrast", "saturate", "frost", "fog", "snow", "spatter"):
        for severity in SEVERITIES:
            colour = corrupt(three, name, severity).double()
            luma = (colour * weights).sum(1, keepdim=True)
            off = (corrupt(grey, name, severity) - luma).abs()
            assert off[colour.amax(1, keepdim=True) < 255].max() < 1, (name, severity)
    assert torch.equal(corrupt(grey, "saturate", 3), grey)
    assert not torch.equal(corrupt(grey, "saturate", 4), grey)


def test_contrast_and_fog_by_hand() -> None:
    x = np.array([0.2, 0.4, 0.6, 0.8]).reshape(1, 1, 2, 2)
    result = distortions.contrast(x, [], 0.5)
    assert result.ravel().tolist() == pytest.approx([0.35, 0.45, 0.55, 0.65])
    x = np.tile(x, (1, 1, 4, 4))
    clouds = weather.plasma(draws(1), 8, 2)[0]
    fogged = weather.fog(x, draws(1), (1, 2))[0, 0]
    assert np.allclose(fogged, (x[0, 0] + clouds) * 0.8 / 1.8)
    assert (clouds.min(), clouds.max()) == (0, 1)


def test_pillow_does_the_rest(photographs: Tensor, grey: Tensor) -> None:
    for images in (photographs, grey):
        source = images[0].permute(1, 2, 0).squeeze(2).numpy()
        file = BytesIO()
        Image.fromarray(source).save(file, "JPEG", quality=40)
        packed = np.asarray(Image.open(file)).reshape(*images.shape[2:], -1)
        result = corrupt(images, "jpeg_compression", 5)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(result, packed)
    blocks = corrupt(torch.arange(256).byte().view(1, 1, 16, 16), "pixelate", 5)[0, 0]
    assert len(blocks.unique()) <= 10 * 10


def test_elastic_transform_of_a_ramp() -> None:
    """A ramp reads off where each pixel came from: an affine map at severity 1."""
    ramp = np.tile(np.linspace(0, 1, 32), (20, 1, 32, 1))
    result = distortions.elastic_transform(ramp, draws(20), (0, 0, 0.08))[:, 0, 8:24, 8:24]
    assert np.allclose(np.diff(result, n=2, axis=2), 0, atol=1e-9)
    assert np.allclose(np.diff(result, n=2, axis=1), 0, atol=1e-9)
    shift = (result - ramp[:, 0, 8:24, 8:24]).reshape(20, -1) * 31
    assert 0.3 < np.abs(shift).mean() < 2.56


def test_edges_of_a_square() -> None:
    """Canny's edge is one pixel wide, on the square's border; a faint square has none."""
    image = np.zeros((2, 16, 16), dtype=np.uint8)
    image[0, 5:11, 5:11] = 200
    image[1, 5:11, 5:11] = 10
    edges = weather._edges(image)
    assert not edges[1].any()
    assert 18 <= edges[0].sum() <= 28
    assert not edges[0, 7:9, 7:9].any()
    distance = weather._distance(edges)
    assert (distance[1] == 20).all()
    point = np.zeros((1, 9, 9), dtype=bool)
    point[0, 4, 4] = True
    around = weather._distance(point)[0]
    assert around[4, 4:].tolist() == [0, 1, 2, 3, 4]
    assert [around[3, 3], around[2, 3], around[2, 2]] == pytest.approx([1.4, 2.1969, 2.8])


def test_an_even_histogram() -> None:
    image = np.array([[[3, 3, 7, 9]], [[5, 5, 5, 5]]], dtype=np.uint8)
    assert weather._equalised(image).tolist() == [[[0, 0, 128, 255]], [[5, 5, 5, 5]]]


# --- one cell at a time -------------------------------------------------------------------------


def test_splits_come_one_by_one() -> None:
    """Every cell once, with the labels of evenly spread rows."""
    test = datasets.load("digits").test
    cells = list(corruptions.splits(test, limit=10, severities=(1, 5)))
    assert [cell[:2] for cell in cells] == [(name, s) for name in ALL for s in (1, 5)]
    rows = corruptions.rows_of(540, 10)
    assert rows.tolist() == list(range(0, 540, 54))
    for name, severity, split in cells:
        assert torch.equal(split.labels, test.labels[rows])
        assert isinstance(split.images, Tensor)
        whole = corrupt(test.images, name, severity) if severity == 1 else None  # type: ignore[arg-type]
        assert whole is None or torch.equal(split.images, whole[rows])
    assert corruptions.rows_of(5, None).tolist() == [0, 1, 2, 3, 4]
    assert corruptions.rows_of(5, 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (torch.zeros(2, 1, 8, 8).byte(), "rain", 1, "unknown corruption 'rain'; known: gaussian"),
        (torch.zeros(2, 1, 8, 8).byte(), "fog", 6, "severity must be 1 to 5, not 6"),
        (torch.zeros(2, 1, 8, 8), "fog", 1, "need uint8 images .* not torch.float32"),
        (torch.zeros(2, 2, 8, 8).byte(), "fog", 1, r"grey \(C=1\) or colour"),
        (torch.zeros(2, 5).byte(), "fog", 1, "use a data set of images"),
        (torch.zeros(2, 1, 7, 9).byte(), "fog", 1, "at least 8 x 8 pixels, not 7 x 9"),
    ],
)
def test_what_cannot_be_corrupted(images: Tensor, name: str, severity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity)


def test_no_samples_at_all() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        corruptions.rows_of(5, 0)
    assert corrupt(torch.zeros(0, 1, 8, 8).byte(), "fog", 1).shape == (0, 1, 8, 8)


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every corruption and severity; a row that is not there is one line."""
    out = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["corruptions", "--data", "digits", str(out)])
    assert picture.main() == 0
    with Image.open(out) as image:
        assert min(image.size) > 1000
    monkeypatch.setattr("sys.argv", ["corruptions", "--row", "540", str(out)])
    assert picture.main() == 2
