"""Bad input gives exit code 2 and one line that names the key or file and what to do about it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from conftest import Command
from tiny import TINY, run_serial, tiny

from ray_subnets import configfile, datasets, evaluation, members, models, report
from ray_subnets.checkpoints import RunFolder

Change = Callable[[Path], object]
"""Writes, or damages, something in a folder."""


def must_say(line: str, patterns: Sequence[str]) -> None:
    """One line, and every pattern is found in it."""
    assert len(line.splitlines()) == 1, line
    for pattern in patterns:
        assert re.search(pattern, line), f"{pattern!r} not found in {line!r}"


def error_lines(done: CompletedProcess[str]) -> list[str]:
    """What a failed command wrote to stderr."""
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.returncode == 2, done.stderr
    return [line for line in done.stderr.splitlines() if line.strip()]


def the_line(done: CompletedProcess[str]) -> str:
    """The error of a command that failed before it had done anything: all that it wrote."""
    lines = error_lines(done)
    assert len(lines) == 1, done.stderr
    assert not done.stdout.strip(), done.stdout
    return lines[0]


def write_config(folder: Path, text: str = TINY) -> str:
    (folder / "tiny.yaml").write_text(text)
    return "tiny.yaml"


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> hash, of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the config file ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "patterns"),
    [
        pytest.param(
            TINY, ["other.yaml"], ["CONFIG", "'other.yaml'", "shipped.*quickstart"], id="missing"
        ),
        pytest.param("name: [tiny", ["tiny.yaml"], ["tiny.yaml", "not valid YAML"], id="not yaml"),
        pytest.param(
            TINY,
            ["tiny.yaml", "parent.batchsize=32"],
            ["tiny.yaml", r"parent\.batchsize", "unknown key", r"did you mean batch_size\?"],
            id="unknown key",
        ),
        pytest.param(
            TINY,
            ["tiny.yaml", "parent.epochs=two"],
            ["tiny.yaml", r"parent\.epochs", "integer", "'two'"],
            id="wrong type",
        ),
        pytest.param(
            TINY,
            ["tiny.yaml", "children.1.sparsity=1.5"],
            ["tiny.yaml", r"children\.1\.sparsity", "less than 1", r"1\.5"],
            id="out of range",
        ),
        pytest.param(
            TINY,
            ["tiny.yaml", "children.1.count=3"],
            ["tiny.yaml", r"children\.1\.count", "partitions of 2", "multiple of 2"],
            id="odd count",
        ),
        pytest.param(
            TINY,
            ["tiny.yaml", "children.0.method=quiet"],
            ["tiny.yaml", r"children\.0", "noisy, sparse, stochastic", "'quiet'"],
            id="unknown method",
        ),
    ],
)
def test_a_bad_config_is_one_line(
    command: Command, tmp_path: Path, text: str, arguments: list[str], patterns: list[str]
) -> None:
    """Exit code 2, and no run folder is made."""
    write_config(tmp_path, text)
    must_say(the_line(command("run", *arguments, "--serial", cwd=tmp_path)), patterns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        # Keys.
        ("slect.count=3", ["slect", "unknown key", "did you mean select"]),
        ("children.1.sparsty=0.5", [r"children\.1\.sparsty", "did you mean sparsity"]),
        ("children.1.tune.rate=0.5", [r"children\.1\.tune\.rate", "known: epochs, batch_size"]),
        ("children.0.tune.epochs=1", [r"children\.0\.tune", "unknown key", "known: name, count"]),
        ("data.folder=x", [r"data\.folder", "unknown key", "known: name, root"]),
        ("children.3.count=4", [r"children\.3", "0 to 2"]),
        ("parent.epochs", ["parent.epochs", r"key\.path=value"]),
        ("parent.epochs=[", [r"parent\.epochs", "not valid YAML"]),
        # Types.
        ("parent.epochs=two", [r"parent\.epochs", "integer", "'two'"]),
        ("parent.epochs=1.5", [r"parent\.epochs", "integer", r"1\.5"]),
        ("parent.lr='0.1'", [r"parent\.lr", "number", r"'0\.1'"]),
        ("include_parent=1", ["include_parent", "boolean"]),
        ("children=sparse", ["children", "'sparse'"]),
        ("parent=", ["parent", "None"]),
        ("name=2024-01-01", [r"\bname\b"]),
        # Ranges.
        ("parent.lr=0", [r"parent\.lr", "greater than 0"]),
        ("parent.lr=.nan", [r"parent\.lr", "finite"]),
        ("parent.momentum=1", [r"parent\.momentum", "less than 1"]),
        ("parent.batch_size=0", [r"parent\.batch_size", "greater than or equal to 1"]),
        ("children.0.sigma=-1", [r"children\.0\.sigma", "greater than 0"]),
        ("children.1.sparsity=1", [r"children\.1\.sparsity", "less than 1"]),
        ("children.2.tau=1.5", [r"children\.2\.tau", "less than or equal to 1"]),
        ("data.num_classes=1", [r"data\.num_classes", "greater than or equal to 2"]),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
        ("name=../x", ["name", r"'\.\./x'"]),
        ("combine=mean", ["combine", "'probabilities', 'weighted', 'logits' or 'vote'", "'mean'"]),
        ("parent.optimizer=lion", [r"parent\.optimizer", "'sgd' or 'adam'"]),
        # What does not fit together.
        ("children.1.count=3", [r"children\.1\.count", "partitions of 2", "multiple of 2"]),
        ("children.0.count=6", [r"children\.0\.count", "mirrored partitions", "multiple of 4"]),
        ("children.1.partition=1", [r"children\.1\.sparsity", "required", "partition is 1"]),
        ("select.count=9", [r"select\.count", "9 members of 8", "add children or select fewer"]),
        ("children.2.anneal_epochs=3", [r"children\.2\.anneal_epochs", r"tune\.epochs"]),
        ("children.0.method=quiet", [r"children\.0", "noisy, sparse, stochastic", "'quiet'"]),
        ("children=[]", ["children", "at least 1"]),
        ("resources.gpus_per_actor=1.5", [r"resources\.gpus_per_actor", "whole"]),
    ],
)
def test_a_bad_setting_is_one_line(override: str, patterns: list[str]) -> None:
    """Every mistake in a config names its key and says what would be right."""
    with pytest.raises(ValueError, match=r".") as caught:
        configfile.parse(TINY, "tiny.yaml", [override])
    must_say(str(caught.value), patterns)
    assert "__" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("- a\n- b\n", ["tiny.yaml", "mapping"]),
        ("", ["tiny.yaml", "mapping"]),
        ("name: a\nname: b\n", ["tiny.yaml", "duplicate key"]),
        ("name: a\n", ["tiny.yaml", "data", "required"]),
        (TINY.replace("method: noisy, ", ""), [r"children\.0", "noisy, sparse, stochastic"]),
        (TINY.replace("sigma: 0.05, ", ""), [r"children\.0\.sigma", "required"]),
    ],
)
def test_a_bad_file_is_one_line(text: str, patterns: list[str]) -> None:
    """The same for what is wrong with the file as a whole."""
    with pytest.raises(ValueError, match=r".") as caught:
        configfile.parse(text, "tiny.yaml")
    must_say(str(caught.value), patterns)


def test_a_config_that_is_not_shipped_is_one_line() -> None:
    """The names that are shipped are listed."""
    with pytest.raises(ValueError, match=r".") as caught:
        configfile.load("quickstrat")
    must_say(str(caught.value), ["CONFIG", "'quickstrat'", "did you mean quickstart"])


# --- the network --------------------------------------------------------------------------------

MY_NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 7))
"""


@pytest.mark.parametrize(
    ("overrides", "patterns"),
    [
        pytest.param(["model=mlq"], ["model", "'mlq'", "known: mlp, lenet_s"], id="unknown"),
        pytest.param(
            ["model.hiden=8"], [r"model\.hiden", "unknown option", "hidden"], id="unknown option"
        ),
        pytest.param(
            ["model=nothere:build"],
            ["model", "'nothere:build'", "installed or lie in the folder"],
            id="no such module",
        ),
        pytest.param(
            ["model=mynet:build"],
            ["model", "'mynet:build'", r"\(2, 7\)", "10 classes", r"must return .*\(2, 10\)"],
            id="wrong output size",
        ),
    ],
)
def test_a_bad_network_is_one_line(
    command: Command, tmp_path: Path, overrides: list[str], patterns: list[str]
) -> None:
    """Found before anything is trained or written."""
    write_config(tmp_path)
    (tmp_path / "mynet.py").write_text(MY_NET)
    done = command("run", "tiny.yaml", "--serial", *overrides, cwd=tmp_path)
    must_say(the_line(done), patterns)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "options", "patterns"),
    [
        ("mlp", {"hidden": "many"}, [r"model\.hidden|model: .*hidden"]),
        ("mlp", {"hidden": 16}, [r"model\.hidden|model: .*hidden"]),
        ("mlp", {"hidden": [0]}, [r"model\.hidden"]),
        ("lenet_s", {}, ["model", "16x16 or more", r"\(1, 8, 8\)"]),
        ("wide_resnet", {"depth": 11}, [r"model\.depth", r"10, 16, 22", "11"]),
        ("wide_resnet", {"depth": "deep"}, [r"model\.depth|model: .*depth"]),
        ("torchvision/resnet999", {}, ["model", "resnet999"]),
        ("torchvision/resnet18", {"widht": 2}, [r"model.*widht"]),
        ("torchvision/resnet18", {}, ["model", r"inputs of shape \(1, 8, 8\)"]),
    ],
)
def test_a_bad_network_option_is_one_line(
    name: str, options: dict[str, object], patterns: list[str]
) -> None:
    """Values of options too, for our networks and torchvision's."""
    with pytest.raises(ValueError, match=r".") as caught:
        models.build(name, (1, 8, 8), 10, options, seed=0)
    must_say(str(caught.value), patterns)


# --- the data -----------------------------------------------------------------------------------

ARRAYS = {
    "train_images": np.linspace(0, 1, 300, dtype=np.float32).reshape(60, 5),
    "train_labels": np.arange(60) % 3,
    "test_images": np.linspace(0, 1, 100, dtype=np.float32).reshape(20, 5),
    "test_labels": np.arange(20) % 3,
}


def npz(without: str = "", **changes: np.ndarray) -> Change:
    """Writes ARRAYS, changed, as `my.npz`."""
    arrays = {name: array for name, array in (ARRAYS | changes).items() if name != without}

    def write(folder: Path) -> None:
        np.savez(folder / "my.npz", **arrays)  # type: ignore[arg-type]

    return write


def with_nan(images: np.ndarray, sample: int) -> np.ndarray:
    result = images.copy()
    result[sample, 2] = np.nan
    return result


def _empty(folder: Path) -> None:
    (folder / "empty").mkdir()


def _truncated(folder: Path) -> None:
    """A `train-images-idx3-ubyte.gz` whose download stopped."""
    (folder / "cut").mkdir()
    whole = gzip.compress(np.random.default_rng(0).bytes(5000))
    (folder / "cut" / "train-images-idx3-ubyte.gz").write_bytes(whole[:2000])


NPZ = ["data=npz", "data.root=my.npz"]
FASHION = "data=fashion_mnist"


@pytest.mark.parametrize(
    ("make", "overrides", "patterns"),
    [
        pytest.param(
            npz(), ["data=digitz"], ["data", "'digitz'", "known: digits, fashion"], id="unknown"
        ),
        pytest.param(
            _empty,
            [FASHION, "data.root=empty"],
            [r"data\.root", "empty", "apt-get install dataset-fashion-mnist", "download=true"],
            id="not there",
        ),
        pytest.param(
            _truncated,
            [FASHION, "data.root=cut"],
            [r"data\.root", "cut/train-images-idx3-ubyte.gz", "download|again|restore|replace"],
            id="truncated idx",
        ),
        pytest.param(
            npz(without="test_labels"),
            NPZ,
            [r"data\.root", r"my\.npz", "no array test_labels"],
            id="missing array",
        ),
        pytest.param(
            npz(train_labels=np.where(np.arange(60) == 41, 3, np.arange(60) % 3)),
            [*NPZ, "data.num_classes=3"],
            ["data", "train label 3", r"sample 41\b", "3 classes 0 to 2"],
            id="label outside",
        ),
        pytest.param(
            npz(train_images=with_nan(ARRAYS["train_images"], 41)),
            NPZ,
            ["data", "train", "NaN", r"sample 41\b", "remove or repair"],
            id="nan",
        ),
    ],
)
def test_bad_data_is_one_line(
    command: Command, tmp_path: Path, make: Change, overrides: list[str], patterns: list[str]
) -> None:
    """Found before anything is trained or written."""
    write_config(tmp_path)
    make(tmp_path)
    done = command("run", "tiny.yaml", "--serial", *overrides, cwd=tmp_path)
    must_say(the_line(done), patterns)
    assert not (tmp_path / "runs").exists()


def _bytes(content: bytes) -> Change:
    return lambda folder: (folder / "my.npz").write_bytes(content)


def _npy(folder: Path) -> None:
    with (folder / "my.npz").open("wb") as file:
        np.save(file, ARRAYS["train_images"])


@pytest.mark.parametrize(
    ("make", "patterns"),
    [
        pytest.param(_bytes(b"hello"), [r"my\.npz"], id="garbage"),
        pytest.param(_bytes(b""), [r"my\.npz"], id="no bytes"),
        pytest.param(_npy, [r"my\.npz"], id="npy"),
        pytest.param(
            npz(train_images=np.zeros((0, 5), np.float32), train_labels=np.zeros(0, int)),
            ["train split is empty"],
            id="empty",
        ),
        pytest.param(
            npz(train_labels=np.zeros(60, int), test_labels=np.zeros(20, int)),
            ["1 class", "at least 2"],
            id="one class",
        ),
        pytest.param(
            npz(train_images=np.zeros((60, 5), bool)), ["train_images", "uint8, float"], id="bools"
        ),
        pytest.param(
            npz(train_labels=np.zeros((60, 1), int)), ["train_labels", "1-D integer"], id="2-d"
        ),
        pytest.param(
            npz(train_labels=np.arange(61) % 3), ["60 images", "61 labels"], id="label too many"
        ),
        pytest.param(
            npz(train_labels=np.arange(59) % 3), ["60 images", "59 labels"], id="label too few"
        ),
        pytest.param(
            npz(test_images=np.zeros((20, 4), np.float32)), ["test", r"\(4,\)"], id="other shape"
        ),
        pytest.param(
            npz(test_images=np.zeros((20, 5), np.uint8)), ["test", "uint8|float"], id="other type"
        ),
        pytest.param(npz(train_images=np.zeros(60, np.float32)), ["train"], id="numbers"),
        pytest.param(npz(train_labels=np.arange(60) % 3 - 1), ["label -1", "0 to 1"], id="below 0"),
        pytest.param(
            npz(test_images=np.full((20, 5), np.inf, np.float32)), ["test", "sample 0"], id="inf"
        ),
    ],
)
def test_bad_arrays_are_one_line(tmp_path: Path, make: Change, patterns: list[str]) -> None:
    """Whatever is wrong with an .npz file, reading it says so."""
    make(tmp_path)
    with pytest.raises(ValueError, match="data") as caught:
        datasets.load("npz", root=str(tmp_path / "my.npz"))
    must_say(str(caught.value), patterns)


# --- the run folder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Its members: three noisy, two sparse and one stochastic child."""
    folder = RunFolder.create(tmp_path_factory.mktemp("errors") / "run")
    run_serial(tiny(), folder)
    return folder.root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged: `run` in `tmp_path`."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_used_folder_is_refused(command: Command, tmp_path: Path, run: Path) -> None:
    """Nothing in it changes, and the line says what can be done instead."""
    write_config(tmp_path)
    before = hashes(run)
    line = the_line(command("run", "tiny.yaml", "--serial", "--out", "run", cwd=tmp_path))
    must_say(line, ["--out", r"\brun\b", "--overwrite", "ray-subnets resume run"])
    assert hashes(run) == before


def test_only_runs_are_overwritten(command: Command, tmp_path: Path) -> None:
    """A folder that no run made is not deleted."""
    write_config(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = command("run", "tiny.yaml", "--serial", "--out", "mine", "--overwrite", cwd=tmp_path)
    must_say(the_line(done), ["--overwrite", "mine", "not a run folder", "nothing was deleted"])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


NO_RUNS = {
    "gone": [r"RUN: .*\bgone\b", "no such folder"],
    "mine": [r"RUN: .*\bmine\b", "not a run folder", r"no config\.yaml"],
}


@pytest.mark.parametrize(
    ("verb", "folder"), [("evaluate", "gone"), ("report", "mine"), ("resume", "mine")]
)
def test_what_is_not_a_run_is_refused(
    command: Command, tmp_path: Path, verb: str, folder: str
) -> None:
    """No such folder, or a folder of something else."""
    (tmp_path / "mine").mkdir()
    must_say(the_line(command(verb, folder, cwd=tmp_path)), NO_RUNS[folder])
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("folder", NO_RUNS)
@pytest.mark.parametrize("verb", [evaluation.evaluate, members.load])
def test_what_is_not_a_run_is_refused_in_python(
    tmp_path: Path, verb: Callable[[Path], object], folder: str
) -> None:
    """The same for the functions behind the commands."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r".") as caught:
        verb(tmp_path / folder)
    must_say(str(caught.value), NO_RUNS[folder])


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_an_unfinished_run_is_refused(
    command: Command, tmp_path: Path, finished: Path, verb: str
) -> None:
    """And the line says how to finish it."""
    (tmp_path / "half").mkdir()
    shutil.copy(finished / "config.yaml", tmp_path / "half")
    line = the_line(command(verb, "half", cwd=tmp_path))
    must_say(line, ["RUN", "half", "did not finish", "ray-subnets resume half"])


# --- damage -------------------------------------------------------------------------------------

CHILD = "children/sparse-000.safetensors"


def flip(name: str) -> Change:
    """Changes one bit of a stored weight."""

    def change(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[-5] ^= 1
        (run / name).write_bytes(content)

    return change


def cut(name: str) -> Change:
    """Keeps the first half of a file."""

    def change(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return change


def put(name: str, content: bytes) -> Change:
    return lambda run: (run / name).write_bytes(content)


def remove(name: str) -> Change:
    return lambda run: (run / name).unlink()


def edit(path: str, value: object = None) -> Change:
    """Sets the value at a `/`-separated path of ensemble.json; None: takes it away."""

    def change(run: Path) -> None:
        record: Any = json.loads((run / "ensemble.json").read_text())
        node = record
        *way, last = [int(part) if part.lstrip("-").isdigit() else part for part in path.split("/")]
        for part in way:
            node = node[part]
        assert node[last] is not None
        if value is None:
            del node[last]
        else:
            node[last] = value
        (run / "ensemble.json").write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("damage", "patterns"),
    [
        pytest.param(cut(CHILD), [f"run/{CHILD}", "resume"], id="truncated child"),
        pytest.param(flip(CHILD), [f"run/{CHILD}", "damaged", "resume"], id="flipped child"),
        pytest.param(
            flip("parent.safetensors"),
            [r"run/parent\.safetensors", "damaged", "resume"],
            id="flipped parent",
        ),
        pytest.param(
            edit("members/-1/weights/file", "../x"),
            [r"run/ensemble\.json", r"'\.\./x'", "out of the run folder"],
            id="path out of the folder",
        ),
        pytest.param(
            edit("num_classes"),
            [r"run/ensemble\.json", "num_classes", "resume"],
            id="missing key",
        ),
        pytest.param(
            put("ensemble.json", b'{"format": 1'),
            [r"run/ensemble\.json", "not valid JSON", "resume"],
            id="not json",
        ),
    ],
)
def test_a_damaged_run_is_one_line(
    command: Command, tmp_path: Path, run: Path, damage: Change, patterns: list[str]
) -> None:
    """`evaluate` names the damaged file; a changed weight never passes as the ensemble's."""
    damage(run)
    must_say(the_line(command("evaluate", "run", cwd=tmp_path)), patterns)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(put("ensemble.json", b"[]"), id="a list"),
        pytest.param(edit("format", 99), id="format"),
        pytest.param(edit("model", "mlp"), id="model"),
        pytest.param(edit("model/hidden", [8]), id="model option"),
        pytest.param(edit("input_shape", [1, 9, 9]), id="input shape"),
        pytest.param(edit("num_classes", "ten"), id="classes"),
        pytest.param(edit("mean", "bright"), id="mean"),
        pytest.param(edit("combine", "sum"), id="combine"),
        pytest.param(edit("members", []), id="no members"),
        pytest.param(edit("members/0/recipe/seed"), id="recipe lacks a field"),
        pytest.param(edit("members/0/recipe/method", "quiet"), id="recipe's method"),
        pytest.param(edit("members/0/recipe/draw", "none"), id="recipe's draw"),
        pytest.param(edit("members/-1/weights/file", 3), id="file is a number"),
        pytest.param(edit("members/-1/weights/sha256"), id="no hash"),
    ],
)
def test_an_edited_ensemble_is_one_line(run: Path, damage: Change) -> None:
    """Whatever is wrong in ensemble.json, loading it says so and names the run's file."""
    damage(run)
    with pytest.raises(ValueError, match=r".") as caught:
        members.load(run)
    must_say(str(caught.value), [r"run/ensemble\.json"])


def _resume(run: Path) -> object:
    return run_serial(tiny(), RunFolder(run))


def _report(run: Path) -> object:
    return report.write(RunFolder(run))


@pytest.mark.parametrize(
    ("damage", "use", "file"),
    [
        (put("result.json", b"{}"), evaluation.evaluate, "result.json"),
        (put("result.json", b"{}"), _report, "result.json"),
        (put("config.yaml", b"name: ["), evaluation.evaluate, "config.yaml"),
        (put("config.yaml", b"\xff"), evaluation.evaluate, "config.yaml"),
        (cut("outputs/noisy-000.npz"), _report, "outputs/noisy-000.npz"),
        (cut("outputs/labels.npz"), _report, "outputs/labels.npz"),
        (remove(CHILD), members.load, CHILD),
        (remove("parent.safetensors"), members.load, "parent.safetensors"),
    ],
)
def test_other_damage_is_one_line(
    run: Path, damage: Change, use: Callable[[Path], object], file: str
) -> None:
    """Every file of a run is named when it cannot be used."""
    damage(run)
    with pytest.raises(ValueError, match=r".") as caught:
        use(run)
    must_say(str(caught.value), [f"run/{re.escape(file)}"])


REPAIRED = [CHILD, "parent.safetensors", "outputs/noisy-000.npz", "outputs/single.npz"]


@pytest.mark.parametrize("damage", [remove, cut, lambda name: put(name, b"")])
@pytest.mark.parametrize("file", REPAIRED)
def test_resume_makes_a_damaged_file_again(
    run: Path, file: str, damage: Callable[[str], Change]
) -> None:
    """What the message about a damaged file advises works: resume gives the same bytes."""
    before = (run / file).read_bytes()
    damage(file)(run)
    _resume(run)
    assert (run / file).read_bytes() == before
    assert len(members.load(run)) == 6


def test_a_changed_recipe_does_not_pass(command: Command, tmp_path: Path, run: Path) -> None:
    """Another seed is a valid recipe of another child: the numbers tell."""
    edit("members/0/recipe/seed", 1)(run)
    edit("members/1/recipe/seed", 2)(run)
    done = command("evaluate", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "differs from the record" in done.stdout


# --- training that goes wrong -------------------------------------------------------------------


def test_a_diverging_parent_is_one_line(command: Command, tmp_path: Path) -> None:
    """Its learning rate is named, after progress lines; what there is stays in the folder."""
    write_config(tmp_path)
    overrides = ["parent.lr=1e9", "parent.weight_decay=0"]
    lines = error_lines(command("run", "tiny.yaml", "--serial", *overrides, cwd=tmp_path))
    must_say(lines[-1], ["parent", "loss is (nan|inf)", r"\blr\b", "lower"])
    assert sum(line.startswith("ray-subnets:") for line in lines) == 1
    assert (tmp_path / "runs" / "tiny" / "config.yaml").is_file()


def test_a_diverging_child_is_left_out(command: Command, tmp_path: Path) -> None:
    """The run succeeds; the failed children are no members, and the record says why."""
    write_config(tmp_path)
    done = command("run", "tiny.yaml", "--serial", "children.1.tune.lr=1e18", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    record = json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())
    failed = {child["id"]: child for child in record["children"] if child["error"]}
    assert set(failed) == {"sparse-000", "sparse-001"}
    for child in failed.values():
        must_say(child["error"], ["loss is (nan|inf)", r"\blr\b"])
        assert child["why"].startswith("failed")
        assert not child["selected"]
    assert not set(failed) & set(record["ensemble"]["members"])
    assert len(record["ensemble"]["members"]) == 6
