"""The pages of the documentation (Markdown), taken apart: blocks, links, sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from helpers.paths import KITS, ROOT

TOP = ROOT / "README.md"
GENERATED = re.compile(r"<!-- begin: (\w+) -->.*?<!-- end: \1 -->", re.DOTALL)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)
CODE = re.compile(r"``.+?``|`[^`]+`")
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
DEFINITION = re.compile(r"^\[(?P<label>[^\]]+)\]: (?P<target>\S+)$", re.MULTILINE)
REFERENCE = re.compile(r"\[(?P<text>[^\[\]]+)\](?:\[(?P<label>[^\[\]]*)\])?(?![\[(:])")
LIST_ITEM = re.compile(r"^\s*([-*]|\d+\.)\s+")
SENTENCE_END = re.compile(r"(?<=[.?!])[)*]*\s+(?=[A-Z0-9`*\[(]|xPos)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: What stands after the opening fence.
        code: The text.
        line: Of the page, of the first line of the code.
    """

    language: str
    code: str
    line: int


@dataclass(frozen=True)
class Page:
    """A Markdown file.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path from the top of the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def is_kit(self) -> bool:
        """Whether `deploy` copies the page: it can't link to what stays behind."""
        return KITS in self.path.parents

    @cached_property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks of code, in order."""
        return [
            Block(
                found["language"], found["code"], self.text[: found.start("code")].count("\n") + 1
            )
            for found in FENCE.finditer(self.text)
        ]

    @cached_property
    def written(self) -> str:
        """The text that a person wrote: without generated sections."""
        return GENERATED.sub("", self.text)

    @cached_property
    def prose(self) -> str:
        """The written text without blocks of code, comments and definitions of links."""
        text = DEFINITION.sub("", FENCE.sub("", self.written))
        return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)

    @cached_property
    def anchors(self) -> set[str]:
        """What a link to one of this page's headings names, as GitHub writes it."""
        anchors: set[str] = set()
        for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", self.text), re.MULTILINE):
            words = re.sub(r"[^\w\- ]", "", strip_markup(heading).lower())
            slug = words.strip().replace(" ", "-")
            repeats = sum(a == slug or re.fullmatch(rf"{slug}-\d+", a) is not None for a in anchors)
            anchors.add(f"{slug}-{repeats}" if repeats else slug)
        return anchors

    @cached_property
    def targets(self) -> list[str]:
        """What the page's links name; a reference without a definition is named as it stands."""
        text = CODE.sub(lambda code: "x" * len(code[0]), FENCE.sub("", self.text))
        definitions = {d["label"].lower(): d["target"] for d in DEFINITION.finditer(self.text)}
        targets = [link["target"] for link in LINK.finditer(text)]
        text = DEFINITION.sub("", FENCE.sub("", self.text))
        for reference in REFERENCE.finditer(LINK.sub("", text)):
            label = (reference["label"] or reference["text"]).lower()
            if label in definitions:
                targets.append(definitions[label])
            elif reference["label"]:
                targets.append(reference[0])
        return targets

    def resolve(self, target: str) -> tuple[Path, str]:
        """Return the file and the anchor that a relative link names."""
        file, _, anchor = target.partition("#")
        return ((self.path.parent / file).resolve() if file else self.path), anchor

    def iterate_sentences(self) -> Iterator[str]:
        """Yield the sentences of paragraphs, list items and cells, without markup."""
        paragraph: list[str] = []
        for line in [*self.prose.splitlines(), ""]:
            is_text = line.strip() and not line.startswith(("#", "|"))
            if paragraph and (not is_text or LIST_ITEM.match(line)):
                yield from split_sentences(" ".join(paragraph))
                paragraph = []
            if is_text:
                paragraph.append(LIST_ITEM.sub("", line).strip())
            elif line.startswith("|"):
                for cell in split_cells(line):
                    yield from split_sentences(cell)


def strip_markup(text: str) -> str:
    """Return what a reader sees; a piece of code counts as one word."""
    text = LINK.sub(lambda link: link["text"], text)
    text = re.sub(r"\[([^\[\]]+)\](?:\[[^\[\]]*\])?", r"\1", text)
    return text.replace("`", "").replace("**", "")


def split_sentences(text: str) -> list[str]:
    """Split a paragraph; a piece of code and a link each become one word."""
    text = CODE.sub(lambda code: re.sub(r"[\s.?!]", "_", code[0]), text)
    return [strip_markup(sentence) for sentence in SENTENCE_END.split(text) if sentence.strip()]


def split_cells(line: str) -> list[str]:
    """Split a line of a table into its cells."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def find_pages() -> list[Page]:
    """Return every page of the repository."""
    folders = ("rotary_export", "tests", "tools", "exported")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.md")]
    return [Page(path) for path in [TOP, *sorted(found)]]


PAGES = find_pages()
