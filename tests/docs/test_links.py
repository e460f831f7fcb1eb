"""Links of the documentation: in the repository, where a code host shows it, and on the site."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from site_pages import checking, sources

ROOT = Path(__file__).parents[2]
WRITTEN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dllm").rglob("*.md")])


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_of_the_repository(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            assert (path.parent / target).exists(), target


def test_a_link_to_a_file_of_the_repository_becomes_one_to_its_page() -> None:
    text = "[a](../samplers/threshold.py) [b](../conf) [c](models) [d](usage.md#in-python) [e](https://x.org/y.md)"
    moved = sources.rewritten("serving.md", text, {"models.md", "usage.md", "serving.md"})
    assert re.findall(r"\((.*?)\)", moved) == [
        "source/samplers/threshold.py.md", "source/conf.md", "models.md", "usage.md#in-python", "https://x.org/y.md",
    ]  # fmt: skip
    folder = sources.rewritten("usage.md", "[a](notebooks/)", {"usage.md", "notebooks/02_b.py", "notebooks/01_a.py"})
    assert folder == "[a](notebooks/01_a.py)"
    assert sources.rewritten("index.md", "[a](docs/usage.md)", {"usage.md"}) == "[a](usage.md)"
    nested = sources.rewritten("models/sdar.md", "[a](../../README.md) [b](../../dllm/models/sdar.py)", {"index.md"})
    assert nested == "[a](../index.md) [b](../source/dllm/models/sdar.py.md)"


def test_files_that_pages_link_to_are_followed_from_page_to_page() -> None:
    found = sources.reached({"index.md": "[a](CONTRIBUTING.md)"}, {"usage.md"})
    assert {"source/CONTRIBUTING.md", "source/dllm/decoding/README.md"} <= set(found)
    assert all((ROOT / path).exists() for path in found.values())
    assert sources.reached({"usage.md": "[a](../no-such.py)"}, {"usage.md"}) == {}


def test_the_page_of_a_source_file_holds_it_whole() -> None:
    page = sources.text_of(sources.place_of("source/samplers/threshold.py.md"))
    assert (ROOT / "samplers" / "threshold.py").read_text().rstrip() in page
    assert page.index("```python\n") < page.index("class Threshold")


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<a href="other.html">', None),
        ('<a href="other.html#there">', None),
        ('<a href="https://example.org/">', None),
        ('<a href="none.html">', "which is not there"),
        ('<a href="other.html#elsewhere">', "no such heading"),
        ('<a href="#elsewhere">', "no such heading"),
        ('<img src="none.png">', "which is not there"),
        ('<script src="https://cdn.example.org/x.js"></script>', "from another host"),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "from another host"),
        ('<script>import("https://cdn.example.org/x.mjs")</script>', "from another host"),
        ('<p style="background: url(https://example.org/x.png)">', "from another host"),
    ],
)
def test_a_built_site_is_searched_for_broken_links_and_other_hosts(
    page: str, problem: str | None, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(f"<p>{page}</p>")
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    found = list(checking.problems(tmp_path))
    assert [problem in each for each in found] == [True] if problem else not found


def test_scripts_of_notebooks_that_load_others_are_left_out() -> None:
    kept, gone = "<script>let x = 1</script>", '<script type="module">import("https://cdn.example.org/x.mjs")</script>'
    assert checking.without_remote_scripts(f"<p>{kept}{gone}{kept}</p>") == f"<p>{kept}{kept}</p>"


@pytest.fixture
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("link", "fails"), [("usage.md", False), ("../samplers/no_such.py", True), ("usage.md#no-such", True)]
)
def test_a_broken_link_fails_the_build(
    link: str, fails: bool, tmp_path: Path, hooks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    monkeypatch.setitem(sys.modules, "docs_hooks", hooks)
    pages = {"docs/index.md": f"# One\n\n[a]({link})\n", "docs/usage.md": "# Usage\n"}
    pages["hook.py"] = "from docs_hooks import on_page_markdown, on_post_build  # noqa: F401\n"
    real = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    own = {"site_name": "x", "hooks": ["hook.py"], "plugins": [], "use_directory_urls": False}
    own |= {"theme": {"name": "material", "font": False}, "validation": real["validation"]}
    pages["mkdocs.yml"] = yaml.safe_dump(own)
    (tmp_path / "docs").mkdir()
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    config = load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    if fails:
        with pytest.raises(Abort, match="in strict mode"):
            build(config)
    else:
        build(config)


def test_the_navigation_lists_every_page_that_exists_and_no_other(hooks: ModuleType) -> None:
    nav = hooks._nav(
        ["index.md", {"Start": "none.md"}, {"More": ["none.md", {"Some": "usage.md"}, "made/*"]}, {"No": ["none.md"]}],
        {"made/*": ["made/a.md", "made/b.md"]},
        {"index.md", "usage.md"},
    )
    assert nav == ["index.md", {"More": [{"Some": "usage.md"}, "made/a.md", "made/b.md"]}]
