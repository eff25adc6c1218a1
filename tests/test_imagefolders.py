"""What can be wrong with a folder of images is one line that names the folder or the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from test_streaming import decoded, inputs, load, write_photos

from ray_subnets import datasets


@pytest.mark.parametrize(
    ("name", "options", "pattern"),
    [
        ("imagefolder", {}, r"data\.root: the folder of the images is needed for .*'imagefolder'"),
        ("imagefolder", {"root": "absent"}, r"data\.root: no such folder: /.*/absent"),
        ("imagefolder", {"root": "empty"}, r"data\.root: no folder train in .*set data\.root="),
        ("imagefolder", {"root": "half"}, r"data\.root: no folder test \(or val\) in .*half;"),
        ("imagefolder", {"root": "bare"}, r"bare/train: .*any class folder.*folder of its own"),
        ("imagefolder", {"root": "hole"}, r"hole/train: .*no valid file .* dog; each class needs"),
        ("imagefolder", {"root": "less"}, r"less/test has no 'dog' \(1 classes missing, 0 new\)"),
        (
            "imagefolder",
            {"root": "more"},
            r"more/test has 'emu', which train has not \(0 .*, 1 new",
        ),
        ("imagefolder", {"root": "good", "crop": 4}, r"data\.crop: .*cropped at random anyway"),
        ("imagefolder", {"root": "good", "resize": 200}, r"data\.resize: .*data\.size, 224, not 2"),
        ("imagefolder", {"root": "good", "download": True}, r"data\.download: .*cannot be fetched"),
        ("imagefolder", {"root": "good", "noise": 0.1}, r"data\.noise: is only for spirals; leave"),
        (
            "imagefolder",
            {"root": "good", "validation": 4},
            r"data\.validation: must leave training",
        ),
        (
            "imagenet",
            {"root": "half"},
            r"no folder val in .*unpack .*datasets\.ImageNet\(.*'val'\)",
        ),
        ("digits", {"size": 32}, r"data\.size: is only for imagefolder and imagenet; leave it out"),
    ],
)
def test_bad_folders_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, object],
    pattern: str,
) -> None:
    """It names the key and the remedy."""
    both = ("cat", "dog")
    parts = {
        "half": (both, ()),
        "hole": (both, both),
        "less": (both, ("cat",)),
        "more": (both, (*both, "emu")),
        "good": (both, both),
    }
    for folder, (train, test) in parts.items():
        write_photos(tmp_path / folder / "train", train, 2, seed=0)
        write_photos(tmp_path / folder / "test", test, 1, seed=0)
    for image in (tmp_path / "hole/train/dog").iterdir():
        image.rename(image.with_suffix(".txt"))
    (tmp_path / "empty").mkdir()
    for part in ("train", "test"):
        (tmp_path / "bare" / part).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=pattern) as caught:
        datasets.load(name, **options)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


DAMAGE: dict[str, Callable[[Path, bytes], object]] = {
    "cut": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "text": lambda path, whole: path.write_text("not an image"),
    "empty": lambda path, whole: path.write_bytes(b""),
    "gone": lambda path, whole: path.unlink(),
    "bad bytes": lambda path, whole: path.write_bytes(whole[:60] + b"?" + whole[80:]),
}


@pytest.mark.parametrize("form", ["jpeg", "png"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_image_is_named(tmp_path: Path, damage: str, form: str) -> None:
    """In training and in evaluation: the file, what is wrong, and what to do."""
    bad = [tmp_path / part / "dog" / "005.jpg" for part in ("train", "test")]
    for path in bad:
        write_photos(path.parent.parent, ("cat", "dog"), 8, seed=0)
        Image.open(path).save(path, format=form)
    data = load(tmp_path, validation_from="test", validation=1, split_seed=3)
    for path in bad:
        DAMAGE[damage](path, path.read_bytes())
    says = r"data\.root: cannot read {} \(.+\); replace or remove the file"
    with pytest.raises(ValueError, match=says.format(bad[0])) as caught:
        inputs(data)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=says.format(bad[1])):
        decoded(data.test.images)
