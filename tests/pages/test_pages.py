"""The pages: what they show runs, what they link to exists, and they are short."""

import inspect
import re
import shutil

import click
import pytest
import torch
import update_pages
from helpers.page_blocks import matches, run_command, run_page, split_commands
from helpers.pages import PAGES, TOP, Page, split_sentences, strip_markup
from helpers.paths import EXPORTED, KITS, ROOT

import rotary_export
from rotary_export.deploy.targets import TARGETS

MAX_LINES = 250
MAX_WORDS = 25
MAX_COLUMNS = 100

# A kit's page is of the folder that `deploy` writes: tests/deploy has its commands.
OWN_PAGES = [page for page in PAGES if not page.is_kit]
README = next(page for page in PAGES if page.path == TOP)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.mark.parametrize(
    "page", [page for page in OWN_PAGES if page.blocks], ids=lambda page: page.name
)
@pytest.mark.filterwarnings("ignore")  # of what a page calls besides this package
def test_blocks_run(page, tmp_path, monkeypatch):
    shutil.copytree(EXPORTED, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(page)


@every_page
def test_links_resolve(page):
    for target in page.targets:
        if target.startswith(("https://", "http://")):
            continue
        assert not target.startswith("["), f"{target} has no definition"
        file, anchor = page.resolve(target)
        assert file.exists(), f"{target} does not exist"
        assert file.is_relative_to(ROOT), f"{target} is outside of the repository"
        if anchor:
            assert anchor in Page(file).anchors, f"{target}: the page has no such heading"


@every_page
def test_files_that_are_named_exist(page):
    names = re.findall(r"`((?:rotary_export|tests|tools|exported)/[\w./-]+)`", page.text)
    missing = [n for n in names if "NAME" not in n and not (ROOT / n).exists()]
    assert missing == []


@pytest.mark.parametrize(
    "page", [page for page in OWN_PAGES if page != README], ids=lambda page: page.name
)
def test_pages_are_linked_both_ways(page):
    assert TOP in {page.resolve(target)[0] for target in page.targets}
    assert page.path in {README.resolve(target)[0] for target in README.targets}


def test_every_kit_is_linked():
    linked = {page.resolve(target)[0] for page in OWN_PAGES for target in page.targets}
    assert {KITS / target / "README.md" for target in TARGETS} <= linked


def test_every_tool_is_listed():
    page = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    tools = [path for path in (ROOT / "tools").rglob("*") if path.suffix in ("", ".py")]
    started = [p for p in tools if p.is_file() and is_started(p.read_text(encoding="utf-8"))]
    names = {path.relative_to(ROOT).as_posix() for path in started}
    assert {name for name in names if name not in page} == set()


def is_started(text):
    return text.startswith("#!") or '__name__ == "__main__"' in text


@every_page
def test_pages_are_short(page):
    assert page.written.count("\n") <= MAX_LINES


def test_readme_is_short():
    assert README.text.count("\n") <= MAX_LINES


@every_page
def test_sentences_are_short(page):
    sentences = [
        sentence for sentence in page.iterate_sentences() if count_words(sentence) > MAX_WORDS
    ]
    assert sentences == []


def count_words(sentence):
    return len([word for word in sentence.split() if re.search(r"\w", word)])


@every_page
def test_tables_fit(page):
    lines = [strip_markup(line) for line in page.prose.splitlines() if line.startswith("|")]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


# ---- what pages say is what the code says


@pytest.mark.parametrize("document", update_pages.DOCUMENTS)
def test_tables_are_up_to_date(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert update_pages.fill(document, text) == text


def test_class_definition_is_the_code():
    page = (ROOT / "rotary_export" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"def __init__\((.*?)\): \.\.\.", page, re.DOTALL)[1]
    namespace = {}
    exec(f"def shown({shown}): ...", namespace)
    real = inspect.signature(rotary_export.RotaryEmbedding.__init__).parameters
    for name, parameter in inspect.signature(namespace["shown"]).parameters.items():
        assert (parameter.kind, parameter.default) == (real[name].kind, real[name].default)
    assert list(real) == re.findall(r"(\w+)(?:=[^,]*)?,", shown)


def test_ci_runs_the_readme_test_command():
    command = re.findall(r"```bash\n(.*pytest)\n```", README.text)[0]
    assert command in (ROOT / ".ci" / "run").read_text()


# ---- the checks themselves


def test_commands_are_split():
    code = "a --b 'c d' && e  # f\nX=1 g \\\n  h | i > j\n"
    want = [["a", "--b", "c d"], ["e"], ["X=1", "g", "h"], ["i", ">", "j"]]
    assert list(split_commands(code)) == want


@pytest.mark.parametrize(
    "command",
    [
        "rotary-export expoort DIR",
        "rotary-export verify BUNDLE --jsn",
        "rotary-export serve bundle --port 1",
        "rotary-export verify missing",
        "python tools/bench/bench.py --fast",
        "tools/targets/setup_target",
        "pip install '.[exports]'",
        "pytest tests/op/test_nothing.py",
        "unheard-of",
    ],
)
def test_wrong_commands_are_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = split_commands(command)
    with pytest.raises((AssertionError, click.UsageError)):
        run_command(words)


def test_what_is_printed_is_compared():
    assert matches("('CPU',) fused (avx2)\n", "('CPU',) fused (avx512)")
    assert matches("1 and 2\n", "1 ... 2")
    assert not matches("1.5\n", "1.50")


def test_sentences_are_split():
    text = "Call `a.b. C`, see [the page](x.md). It returns 1.5 of them! (Or none.) Fine."
    assert [count_words(sentence) for sentence in split_sentences(text)] == [5, 5, 2, 1]


def test_anchors_are_those_of_github(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# The op: `a::B`, version 1\n## Why\n```bash\n# no\n```\n## Why\n")
    assert Page(path).anchors == {"the-op-ab-version-1", "why", "why-1"}
