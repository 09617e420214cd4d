"""The documentation: links lead somewhere, signatures are the code's, and the README's program runs."""

import ast
import configparser
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest
import timm
import torch

import m2pt
from m2pt.linear import FusedCrossModalLinear

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, ROOT / "benchmarks" / "README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_doc = pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)


def prose(page):
    """A page without its code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and ROOT in (target, *target.parents), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@each_page
def test_programs_can_be_parsed(page):
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(code)


@each_doc
def test_a_page_opens_with_what_it_answers(page):
    title, opening, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert title.startswith("# ") and re.match(r"\w", opening) and opening.rstrip().endswith(".")


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *DOCS], ids=lambda page: page.stem)
def test_table_cells_are_short(page):
    for line in prose(page).splitlines():
        if line.startswith("|"):
            assert all(len(cell.strip()) <= 200 for cell in line.split("|")), line


def test_the_readme_is_short_and_shows_the_program_at_once():
    lines = README.splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:40])
    assert all(name in first for name in ("reparameterize_aux_into_target_model(", ".backward()", "merge_pathways("))


def test_the_readme_program_trains_and_merges(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    [program] = [code for language, code in FENCE.findall(README) if language == "python"]
    config = transformers.ASTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    monkeypatch.setattr(transformers.ASTModel, "from_pretrained", lambda name: transformers.ASTModel(config))
    connect = m2pt.reparameterize_aux_into_target_model
    connected = []

    def counted(*models):
        connect(*models)
        connected.extend(module for module in models[0].modules() if isinstance(module, FusedCrossModalLinear))

    monkeypatch.setattr(m2pt, "reparameterize_aux_into_target_model", counted)
    scope = {"loader": [(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))]}
    program = program.replace("vit_base", "vit_tiny").replace("pretrained=True", "pretrained=False")
    (tmp_path / "program.py").write_text(program)
    model = runpy.run_path(tmp_path / "program.py", scope)["model"]
    assert len(connected) == 48 and all(layer.cross_modal_scale.item() for layer in connected)
    timm.create_model("vit_tiny_patch16_224").load_state_dict(model.state_dict())


def signature(value):
    """A call as the page writes it: without annotations, and with defaults that are values of Python's."""
    parameters = []
    for parameter in inspect.signature(value).parameters.values():
        if not isinstance(parameter.default, (type(None), bool, int, float, str, type)):
            parameter = parameter.replace(default=...)
        parameters.append(parameter.replace(annotation=parameter.empty))
    return str(inspect.Signature(parameters)).replace("Ellipsis", "...")


def documented():
    """Module, name and signature of every entry in the lists of docs/api.md."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if module := re.match(r"`([\w.]+)`\n", section):
            for name, parameters in re.findall(r"^- `(\w+)(\([^`]*\))?`", section, re.MULTILINE):
                yield module[1], name, parameters


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [pytest.param(*entry, id=".".join(entry[:2])) for entry in documented()],
)
def test_signatures_are_the_code(module, name, parameters):
    if "integrations" in module:
        pytest.importorskip(module.rpartition(".")[2])
    value = getattr(importlib.import_module(module), name)
    assert parameters == (signature(value) if callable(value) else "")


@pytest.mark.parametrize("module", ["m2pt", "m2pt_kernels", "m2pt.train", "m2pt.models"])
def test_every_public_name_is_documented(module):
    names = {name for place, name, _ in documented() if place == module}
    assert names == set(importlib.import_module(module).__all__)


def test_one_version_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    newest = re.search(r"^## \[(.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version
    assert re.search(r"^date-released: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == newest[2]
