"""Table 4.1: ten pretrained networks made into noisy ensembles, without training.

    python -m analysis.pretrained_networks --root /data/imagenet        # all ten, then the table
    python -m analysis.pretrained_networks --generated --only squeezenet resnet18

Each network is a run of `configs/imagenet_noisy_NAME.yaml` with torchvision's pretrained weights
(`--weights FOLDER`: NAME.safetensors or NAME.pth from there, for machines without a network). A run
that is finished is not done again, one that was stopped goes on. `--generated` shows that noise of
a solved sigma, and pruning, work on every network: random weights, a few small generated images, so
that its accuracies mean nothing, and the table says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from ray_subnets.checkpoints import CONFIG, RunFolder

NETWORKS = (
    *("alexnet", "densenet121", "inception_v3", "mobilenet_v2", "resnet18"),
    *("resnext50", "shufflenet_v2", "squeezenet", "vgg16", "wide_resnet50"),
)
SIZES = {"inception_v3": 96}
"""pixels of each side for generated images, where 64 are too few"""
CLASSES = 4
NOISE = "{method: noisy, count: 2, kl_target: 0.002, kl_draws: 1, density: 0.1}"
PRUNED = "{method: sparse, count: 1, sparsity: 0.1, criterion: magnitude, tune: {epochs: 0}}"


def generate(root: Path) -> None:
    """A folder of images that tell their class by their colour: train 8, val 24 of each class."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 24)):
        for label in range(CLASSES):
            folder = root / part / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.integers(0, 256, (80, 80, 3))
                pixels[:, :, label % 3] //= 1 + label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def overrides(
    name: str, root: str, *, weights: str | None = None, generated: bool = False
) -> list[str]:
    """Settings that are changed in `imagenet_noisy_NAME`, as on the command line.

    Args:
        root: of the images.
        weights: a file, instead of torchvision's.
        generated: the images are those of `generate`, the weights drawn, children few, and one of
            them is pruned.
    """
    changed = [f"data.root={root}"]
    if weights:
        changed.append(f"weights={weights}")
    if generated:
        size = SIZES.get(name, 64)
        changed += [
            *("weights=null", "data.name=imagefolder", "data.workers=1"),
            *(f"data.size={size}", f"data.resize={size + 8}", "data.validation=40"),
            f"children=[{NOISE}, {PRUNED}]",
            "select.count=2",
        ]
    return changed


def line(record: dict[str, Any]) -> list[str]:
    """A row of the table, from `result.json`."""
    trust = record["trust_region"][0]
    parent, whole = record["parent"]["test"], record["ensemble"]["test"]
    noisy = [child for child in record["children"] if child["id"].startswith("noisy")]
    pruned = [child for child in record["children"] if child["id"].startswith("sparse")]
    mean = sum(child["test"]["accuracy"] for child in noisy) / len(noisy)
    return [
        f"{100 * parent['accuracy']:.2f}",
        f"{100 * mean:.2f}",
        f"{100 * whole['accuracy']:.2f}",
        f"{100 * pruned[0]['test']['accuracy']:.2f}" if pruned else "",
        f"{parent['nll']:.4f}",
        f"{whole['nll']:.4f}",
        f"{trust['sigma']:.5f}",
        f"{trust['kl']:.5f}",
    ]


def table(records: dict[str, dict[str, Any]], *, generated: bool) -> Table:
    title = "Random weights, generated images: that it works, no result" if generated else None
    found = Table(title=title)
    for column in (
        *("network", "parent %", "child %", "ensemble %", "pruned %"),
        *("NLL, parent", "NLL, ensemble", "sigma", "KL"),
    ):
        left = column == "network"
        found.add_column(column, justify="left" if left else "right", no_wrap=left)
    for name, record in records.items():
        found.add_row(name, *line(record))
    return found


def weights_in(folder: str | None, name: str) -> str | None:
    """The file of a network's weights.

    Raises:
        ValueError: there is none.
    """
    if folder is None:
        return None
    found = [path for path in sorted(Path(folder).glob(f"{name}*")) if path.is_file()]
    if not found:
        raise ValueError(f"--weights: no file {name}.safetensors or {name}*.pth in {folder}")
    return str(found[0].resolve())


def run(name: str, folder: Path, changed: Sequence[str], serial: bool) -> dict[str, Any]:
    """The run of one network, in a process of its own: `result.json`.

    Raises:
        ValueError: it failed; it has said why.
    """
    if not (folder / "result.json").is_file():
        command = [sys.executable, "-m", "ray_subnets.launch"]
        if (folder / CONFIG).is_file():
            command += ["resume", str(folder)]
        else:
            command += ["run", f"imagenet_noisy_{name}", *changed, "--out", str(folder)]
        if subprocess.run([*command, *["--serial"] * serial], stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"{name}: the run failed; the same command goes on with it")
    return RunFolder.open(folder, needs="result.json").read_json("result.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", help="the folder of ImageNet: train/ and val/")
    parser.add_argument("--weights", metavar="FOLDER", help="with a file for each network")
    parser.add_argument("--generated", action="store_true", help="no images, no weights: does it?")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--out", default="runs/table_4_1")
    parser.add_argument("--serial", action="store_true", help="without Ray")
    options = parser.parse_args(arguments)
    if bool(options.root) == options.generated:
        parser.error("give --root FOLDER, or --generated")
    out = Path(options.out)
    root = options.root
    if options.generated:
        root = str(out / "images")
        generate(Path(root))
    records, failed = {}, []
    for name in options.only:
        try:
            changed = overrides(
                name,
                str(Path(root).resolve()),
                weights=weights_in(options.weights, name),
                generated=options.generated,
            )
            records[name] = run(name, out / name, changed, options.serial)
        except ValueError as error:
            failed.append(str(error))
    console = Console(width=110)
    console.print(table(records, generated=options.generated))
    for reason in failed:
        console.print(reason, style="red", markup=False)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
