"""What MkDocs calls while it builds the site: pages made from the code, links into the repository, a last check."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dllm.resolve import names
from site_pages import checking, pages, reference, sources

log = logging.getLogger("mkdocs.hooks.dllm")
DOCS = Path(__file__).parent
_IPYTHON = TemporaryDirectory(prefix="dllm-ipython-")  # removed when the build ends
# Pages outside docs/ that the navigation names.
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md")
# Pages of wide tables, which get the room of the navigation.
WIDE = re.compile(r"results\.md|bench-[^/]+\.md|.+/report\.md")


def on_pre_build(config: MkDocsConfig) -> None:
    """Notebooks run without the configuration of the user's IPython; only errors of their kernels are printed."""
    profile = Path(_IPYTHON.name) / "profile_default"
    profile.mkdir(exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n", encoding="utf-8")
    os.environ["IPYTHONDIR"] = _IPYTHON.name


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the parts of the navigation that are made from the code, and leave out pages that do not exist."""
    known = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*") if file.suffix in (".md", ".py", ".ipynb")}
    known |= {"index.md", "reference/index.md", *(f"source/{name}" for name in OUTSIDE)}
    kinds = pages.policies()
    made: dict[str, list[Any]] = {
        "policies/*": [{kind.capitalize(): [f"policies/{name}.md" for name in own]} for kind, own in kinds.items()],
        "caches/*": [f"caches/{name}.md" for name in names("cache")],
        "reference/*": [f"reference/{name}.md" for name in reference.PAGES],
        "notebooks/*": sorted(page for page in known if re.fullmatch(r"notebooks/[^/]+\.(py|ipynb)", page)),
    }
    config.nav = _nav(config.nav or [], made, known)
    return config


def _nav(entries: list[Any], made: Mapping[str, list[Any]], known: set[str]) -> list[Any]:
    """A part of the navigation."""
    kept: list[Any] = []
    for entry in entries:
        match entry:
            case str() if entry in made:
                kept += made[entry]
            case str() if entry in known:
                kept.append(entry)
            case dict():
                [(title, part)] = entry.items()
                inner = _nav(part if isinstance(part, list) else [part], made, known)
                kept += [{title: inner if isinstance(part, list) else inner[0]}] if inner else []
            case _:
                log.info("%s is not there, and not in the navigation", entry)
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those of the repository's files that any page links to."""
    for uri, text in _generated(files).items():
        if (old := files.get_file_from_path(uri)) is not None:
            files.remove(old)
        files.append(File.generated(config, uri, content=text))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    texts["index.md"] += "".join(f"[{name}]({name})" for name in OUTSIDE)
    for uri, path in sources.reached(texts, set(files.src_uris)).items():
        if uri.endswith(".md"):
            files.append(File.generated(config, uri, content=sources.text_of(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(sources.ROOT / path)))
    return files


def _generated(files: Files) -> dict[str, str]:
    """The pages made from the code, by their paths."""
    front = (sources.ROOT / "README.md").read_text(encoding="utf-8")
    made = {"index.md": pages.linked_tables(front), "reference/index.md": reference.index()}
    made |= {f"policies/{name}.md": pages.policy(name) for name in names("sampler")}
    made |= {f"caches/{name}.md": pages.cache(name) for name in names("cache")}
    made |= {f"reference/{name}.md": reference.page(name) for name in reference.PAGES}
    for file in files:
        if file.src_uri in ("policies.md", "caches.md", "models.md"):
            made[file.src_uri] = pages.linked_headings(file.src_uri, file.content_string)
        elif re.fullmatch(r"models/[^/]+\.md", file.src_uri):
            made[file.src_uri] = pages.model(file.content_string, PurePosixPath(file.src_uri).stem)
    return made


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages, and give wide tables room."""
    if WIDE.fullmatch(page.file.src_uri):
        page.meta["hide"] = ["navigation", "toc"]
    return sources.rewritten(page.file.src_uri, markdown, set(files.src_uris))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The same for notebooks, whose Markdown MkDocs does not see, and nothing in them from another host."""
    if page.file.src_uri.endswith(".md"):
        return html
    name = PurePosixPath(page.file.src_uri).name
    link = f'<p>This notebook <a href="{name}" download>as a file</a>, for Jupyter with jupytext.</p>'
    html = checking.without_remote_scripts(html) + link
    return sources.rewritten_html(page.file.src_uri, html, {file.src_uri: file.dest_uri for file in files})


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of every broken link and of everything loaded from another host; with --strict the build fails."""
    for problem in checking.problems(Path(config.site_dir)):
        log.warning(problem)
