"""The tables of the long runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[object]]]


def tabulate_kills(results: dict[str, Any]) -> Table:
    """Return the table of `kills.py`: headers and rows."""
    names = ("random", "placed", "new", "restored", "lost", "mixed", "rubbish")
    headers = ["what is killed", "at random", "placed", "new one there", *names[3:]]
    rows = [[row["what"], *(row[name] for name in names)] for row in results["rows"]]
    total = ["all", *(sum(row[name] for row in results["rows"]) for name in names)]
    return headers, [*rows, total]


def tabulate_soak(read: Callable[[str], Any]) -> Table:
    """Return the table of all long runs: headers and rows.

    Args:
        read: Returns a result of tools/results by name.
    """
    calls, kills, servers = read("op_calls"), read("kills"), read("load")
    mutations, graphs = read("mutations"), read("fuse_graphs")
    rows: list[list[object]] = [
        [row["what"], calls["seed"], f"{row['done']:,}", len(row["wrong"]), _describe(row)]
        for row in calls["rows"]
    ]
    bad = sum(row[name] for row in kills["rows"] for name in ("lost", "mixed", "rubbish", "failed"))
    rows.append(["runs that were killed", kills["seed"], f"{kills['kills']:,}", bad, ""])
    kinds = ("tracebacks", "control_codes", "opened_outside", "signals", "timeouts")
    rows.append(
        [
            "damaged bundles and files",
            mutations["seed"],
            f"{mutations['mutations']:,}",
            sum(len(mutations[kind]) for kind in kinds),
            f"{mutations['succeeded']:,} calls succeeded, {mutations['refused']:,} were refused",
        ]
    )
    outcomes = graphs["outcomes"]
    rows.append(
        [
            "changed graphs, fused",
            graphs["seed"],
            f"{graphs['graphs']:,}",
            sum(len(graphs[kind]) for kind in ("unequal", "tracebacks", "signals", "timeouts")),
            f"{outcomes['fused, equal']:,} fused and equal, {outcomes['refused']:,} refused",
        ]
    )
    for server, row in servers.items():
        what = f"requests of {row['clients']} clients, {server}"
        wrong = row["wrong"] + row["errors"]
        rows.append([what, "", f"{row['requests']:,}", wrong, f"in {row['seconds']:g} s"])
    return ["what", "seed", "number", "wrong", "note"], rows


def _describe(row: dict[str, Any]) -> str:
    grown = f"memory grew by {row['growth_mib']:g} MiB" if "growth_mib" in row else ""
    return f"not run: {row['not_run']}" if "not_run" in row else grown


def tabulate_load(results: dict[str, Any]) -> Table:
    """Return the table of `load_server.py`: headers and rows."""
    names = ("protocols", "clients", "seconds", "requests", "errors", "wrong")
    headers = ["server", *names, "p50, ms", "p99, ms", "requests per second"]
    measured = (*names, "p50_ms", "p99_ms", "per_second")
    return headers, [[server, *(row[n] for n in measured)] for server, row in results.items()]


def tabulate_attack(results: list[dict[str, Any]]) -> Table:
    """Return the table of `attack_server.py`: headers and rows."""
    names = {
        "attack": "attack",
        "seconds": "seconds",
        "answers": "answers",
        "health_max_ms": "slowest answer of health, ms",
        "growth_mib": "growth, MiB",
    }
    return [*names.values()], [[row[name] for name in names] for row in results]
