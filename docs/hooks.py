"""Let MkDocs make a site of this repository's Markdown as it stands.

The site is docs/ and all that its pages link to, at the repository's paths, so that links work on GitHub and on the
site alike. A folder becomes a list of its files, as on GitHub; the command line's page is made from its ``--help``.
"""

import logging
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")

log = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    config.copyright = config.copyright.replace("VERSION", version[1])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    own = {*config.extra_css, *config.extra["polyfills"]}
    docs = [file for file in files if file.src_dir == config.docs_dir and file.src_uri not in own]
    pages = {Path(config.docs_dir, file.src_uri) for file in docs if file.is_documentation_page()}
    for file in docs:
        files.remove(file)
    for path in sorted(_linked([*pages, ROOT / "README.md", ROOT / "benchmarks/results"])):
        uri = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            names = "\n".join(f"- [{each.name}]({each.name})" for each in sorted(path.iterdir()))
            file = File.generated(config, f"{uri}/index.md", content=f"# {uri}\n\n{names}")
        else:
            file = File(uri, str(ROOT), config.site_dir, config.use_directory_urls)
        if path not in pages:
            file.inclusion = InclusionLevel.NOT_IN_NAV  # it need not be
        files.append(file)
    files.append(File.generated(config, "docs/cli.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    folder = (ROOT / page.file.src_uri).parent
    return LINK.sub(lambda link: f"{link[0]}/index.md" if (folder / link[1]).is_dir() else link[0], markdown)


def on_page_content(html: str, **_: object) -> str:
    """Undo what Markdown makes of docstrings: Sphinx's roles stay, and two shapes ``(*, n)`` become emphasis."""
    html = re.sub(r"\(<em>(, [^<]*\()</em>, ", r"(*\1*, ", html)
    html = re.sub(r":(?:class|data|func|meth):(?=<code>)", "", html)
    return _keep_words_whole(html)


def on_post_page(output: str, *, page: Page, **_: object) -> str:
    for element in LOADED.findall(output):
        log.warning("%s loads something from elsewhere: %s", page.file.src_uri, element)
    return output


def _keep_words_whole(html: str) -> str:
    """Forbid line breaks in shapes and at the hyphens of code, and allow them at underscores of a table's header."""

    def whole(code: re.Match[str]) -> str:
        return re.sub(r"[^\s<>]*[-…][^\s<>]*", r'<span class="word">\g<0></span>', code[0])

    html = re.sub(r"(?<=<td>)\d+ × \d+ → \d+(?=</td>)", r'<span class="word">\g<0></span>', html)
    html = re.sub(r"(?<!<span></span>)(?<!<pre>)(?<=<code>)[^<\n]*(?=</code>)", whole, html)
    return re.sub(r"(?<=<th>)[^<]*(?=</th>)", lambda header: header[0].replace("_", "_<wbr>"), html)


def _linked(start: Iterable[Path]) -> set[Path]:
    """Files and folders of the repository that can be reached, the start too."""
    found: set[Path] = set()
    pending = list(start)
    while pending:
        path = pending.pop()
        if path in found or not path.exists() or not path.is_relative_to(ROOT):
            continue
        found.add(path)
        if path.is_dir():
            pending += path.iterdir()
        elif path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            pending += [(path.parent / link).resolve() for link in links]
    return found


def _command_line() -> str:
    """The help of all commands as Markdown: its examples as code, and outside of code no ``<``, which begins HTML."""
    command = [sys.executable, "-m", "typer", "torch_switchback.cli.app", "utils", "docs", "--name", "torch-switchback"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"^  (?=\S)", "    ", text.replace("\b", ""), flags=re.MULTILINE)
    return re.sub(r"```.*?```|`[^`]*`|<", lambda part: "&lt;" if part[0] == "<" else part[0], text, flags=re.DOTALL)
