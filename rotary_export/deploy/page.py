"""The page of a kit, for the bundle that lies beside it.

In a page, GRAPH is the name of the graph. `<!-- only: WORDS -->` begins lines for some readers, and
`<!-- end only -->` ends them: WORDS are of `checkout`, who read the page in the repository,
`rotate`, `model`, who read it beside a bundle with that graph, and `decoder`, beside one with a
key/value cache.
"""

from __future__ import annotations

import re
from pathlib import Path

_ONLY = re.compile(
    r"^<!-- only: (?P<readers>[\w ]+) -->\n(?P<lines>.*?)^<!-- end only -->\n", re.M | re.S
)


def fit_page(page: Path, graph: str, is_decoder: bool) -> None:
    """Leave in a page what is for readers who have the bundle.

    Args:
        page: README.md of the folder that deploy writes.
        graph: The bundle's main graph.
        is_decoder: It has a key/value cache.
    """
    here = {graph, "decoder"} if is_decoder else {graph}
    text = page.read_text(encoding="utf-8")
    text = _ONLY.sub(lambda only: only["lines"] if here & {*only["readers"].split()} else "", text)
    text = re.sub(r"\bGRAPH\b|\bGRAPH(?=[_.])", graph, text)
    page.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
