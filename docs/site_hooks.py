"""Hooks of MkDocs: equations become MathML, and links out of docs/ become links to the repository."""

import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = ("navigation.gif", "balance.gif", "paxmen.gif", "vmas.png")


def on_files(files: Files, *, config: Any) -> Files:
    """Add pictures of results/, which lie there once."""
    for name in PICTURES:
        files.append(File.generated(config, f"films/{name}", abs_src_path=str(ROOT / "results" / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Point links to files beyond docs/ to the repository; without its address, ``repo_url``, leave their text."""
    repository = config.repo_url
    here = Path(config.docs_dir, page.file.src_path).parent

    def absolute(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        target = Path(os.path.normpath(here / path))
        if "://" in path or not path or target.is_relative_to(config.docs_dir) or not target.exists():
            return match[0]
        if not repository:
            return match[1].removeprefix("[").removesuffix("](")
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{repository}/{kind}/main/{target.relative_to(ROOT)}{'#' + anchor if anchor else ''})"

    depth = "../" * page.file.src_path.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+results/([\w]+\.(?:gif|png))\)", rf"]({depth}films/\1)", markdown)
    return re.sub(r"((?<!!)\[[^\]]*\]\()([^)\s]+)\)", absolute, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Render what arithmatex has marked, without JavaScript or a network."""

    def mathml(match: re.Match[str]) -> str:
        source = re.sub(r"&(amp|lt|gt);", lambda entity: {"amp": "&", "lt": "<", "gt": ">"}[entity[1]], match[2])
        return convert(source, display="block" if match[1] == "div" else "inline")

    html = re.sub(r'<(span) class="arithmatex">\\\((.*?)\\\)</span>', mathml, html, flags=re.DOTALL)
    return re.sub(r'<(div) class="arithmatex">\\\[(.*?)\\\]</div>', mathml, html, flags=re.DOTALL)


def on_post_page(output: str, **_: Any) -> str:
    """Show names that the reference does not list as code, without the link that was not found."""
    return re.sub(r"\[(<code>[^<]*</code>)\]\[torchrl_marl\.[\w.]+\]", r"\1", output)
