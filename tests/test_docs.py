"""The pages of docs/: links lead somewhere, Python runs, figures are copied, the reference is
built from the docstrings."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main

import ray_subnets
from ray_subnets import launch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve()
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], target


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")


def test_the_walk_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block of Python, in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code in blocks(DOCS / "ten_minutes.md", "python"):
        exec(code, scope)
    ensemble, noisy = scope["ensemble"], scope["noisy"]
    assert isinstance(ensemble, ray_subnets.Ensemble)
    assert isinstance(noisy, ray_subnets.Ensemble)
    assert (len(ensemble), len(noisy)) == (8, 8)
    assert noisy.record is not None
    assert noisy.record["trust_region"][0]["kl"] == pytest.approx(0.02, rel=0.02)
    assert len(ray_subnets.load_cascade("digits_cascade", model=scope["model"]).ensemble) == 8
    assert "of 8 members asked" in capsys.readouterr().out


def test_the_page_on_text_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for code in blocks(DOCS / "text.md", "python"):
        exec(code, scope)
    truth, p = scope["truth"], scope["p"]
    assert float((p.argmax(1) == truth).float().mean()) > 0.8
    given: Any = SimpleNamespace(logits=torch.ones(2, 3))
    logits = scope["Logits"](lambda input_ids, attention_mask: given)
    assert logits(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 3)


def test_the_regression_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which figures one run gave: here they are again, within another processor's reach."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    page = DOCS / "regression.md"
    (code,) = blocks(page, "python")
    exec(code, scope)
    rows = re.findall(
        r"^\| (parent|8 members) \| (.*) \|$", (DOCS / "regression.md").read_text(), re.M
    )
    told = {name: [float(figure) for figure in row.split(" | ")] for name, row in rows}
    for name, found in (("parent", scope["alone"]), ("8 members", scope["measured"])):
        assert told[name] == pytest.approx([found[key] for key in ("rmse", "mae", "nll")], abs=0.05)
    assert scope["answer"].equal(scope["again"](scope["x"][scope["test"]]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_exist(page: Path) -> None:
    """Every `ray-subnets ...` and `make ...`, in blocks and in the text."""
    text = page.read_text()
    cli = typer.main.get_command(launch.app)
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"^ray-subnets .*$|(?<=`)ray-subnets [^`]*(?=`)", text, re.MULTILINE):
        _, name, *words = shlex.split(line, comments=True)
        command = cli.commands[name]  # type: ignore[attr-defined]
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
    for target in re.findall(r"\bmake ([a-z][a-z-]+)", " ".join(re.findall(r"`([^`]*)`", text))):
        assert f"\n{target}:" in makefile, target
    for module in re.findall(r"python -m ([a-z0-9_.]+)", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("name", ["choosing", "costs"])
def test_figures_are_those_of_the_results(name: str) -> None:
    """Numbers with two digits and more after the point are copied, not typed anew."""
    sources = [ROOT / "README.md", ROOT / "CHANGELOG.md", DOCS / "results.md", DOCS / "knobs.md"]
    known = "".join(source.read_text() for source in sources)
    text = re.sub(r"torch [\d.]+", "", (DOCS / f"{name}.md").read_text())
    for figure in re.findall(r"\d*\.\d{2,}", text):
        assert figure in known or figure.removeprefix("0") in known, figure


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("build", DOCS / "build.py")
    assert spec
    assert spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.build(tmp_path)
    page = (tmp_path / "ray_subnets.html").read_text()
    for name in ray_subnets.__all__:
        assert f'id="{name}"' in page, name
    assert "Make children of a trained classifier" in page
    for module in build.MODULES[1:]:
        assert (tmp_path / f"{module.replace('.', '/')}.html").is_file()
