"""Fill the generated sections of the pages from the code and from tools/results, or check them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOOLS = ("bench", "coverage", "matrix", "real", "soak", "targets", "teeth", "wheel")
sys.path += [str(ROOT / "tools" / folder) for folder in TOOLS]

import coverage_report
import decoders_report
import libraries_report
import matrix_report
import measure_real
import performance_section
import soak_report
import targets
import teeth_report
import wheel_report

from rotary_export.bundle.manifest import read_manifest
from rotary_export.deploy.targets import TARGETS
from rotary_export.embedding import RotaryEmbedding
from rotary_export.exporters.onnx import minimum_onnxruntime
from rotary_export.graphs.config import DTYPES
from rotary_export.graphs.plain import find_longest_xpos
from rotary_export.op.onnx_signature import NEWEST_OPSET, OLDEST_OPSET
from rotary_export.proof.tolerances import TOLERANCES


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _read_result(name: str) -> Any:
    path = ROOT / "tools" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def table(tabulate: Callable[[Any], tuple[Any, Any]], name: str) -> Callable[[], str]:
    """Return what writes the table of one result of tools/results."""
    return lambda: format_table(*tabulate(_read_result(name)))


def write_tolerances() -> str:
    """One line per tolerance."""
    rows = (
        (
            f"`{name}`",
            f"{t.max_ulp:g}" if t.max_ulp else "equal to the bit",
            f"{t.noise_factor:g}" if t.noise_factor else "",
            t.reason,
        )
        for name, t in TOLERANCES.items()
    )
    return format_table(("tolerance", "ulp", "or times noise", "reason"), rows)


def write_minimum_onnxruntime() -> str:
    """One line per range of opsets that agree."""
    ranges: list[tuple[list[int], dict[str, str]]] = []
    for opset in range(OLDEST_OPSET, NEWEST_OPSET + 1):
        minimum = minimum_onnxruntime(opset)
        if ranges and ranges[-1][1] == minimum:
            ranges[-1][0].append(opset)
        else:
            ranges.append(([opset], minimum))
    rows = (
        (f"{o[0]} to {o[-1]}" if len(o) > 1 else o[0], m["fused"], m["portable"]) for o, m in ranges
    )
    return format_table(("opset", "fused", "portable"), rows)


def write_xpos_lengths() -> str:
    """The longest export with xPos, per type."""
    rope = RotaryEmbedding(64, use_xpos=True)
    rows = ((name, f"{find_longest_xpos(rope, dtype):,}") for name, dtype in DTYPES.items())
    return format_table(("dtype of query and key", "longest max_seq_len"), rows)


def write_proof() -> str:
    """The parity report of exported/xpos, but for the stored tables."""
    parity = read_manifest(ROOT / "exported" / "xpos").parity
    rows = (
        (
            f"{row['graph']}.{row['output']}",
            row["runtime"],
            f"{row['eager']['max_abs']:.2g}",
            f"{row['eager']['max_ulp']:.2g}",
            "equal to the bit" if row["eager"]["exact"] else "",
            f"{row['oracle']['max_ulp']:.2f}",
        )
        for row in parity["rows"]
        if not row["runtime"].startswith("stored")
    )
    headers = ("output", "runtime", "max abs error", "ulp", "against eager", "ulp to float64")
    return format_table(headers, rows)


def write_teeth() -> str:
    """The verdict on each planted fault, from tools/results/proof_teeth.json."""
    rows = _read_result("proof_teeth")["rows"]
    return "\n\n".join(
        (
            teeth_report.summarize(rows),
            format_table(*teeth_report.tabulate_verdicts(rows)),
            format_table(*teeth_report.tabulate_sizes(rows)),
        )
    )


def write_soak() -> str:
    """One line per long run, from tools/results."""
    return format_table(*soak_report.tabulate_soak(_read_result))


def write_performance() -> str:
    """Rope's share of a model first, then the ratios, from tools/results/bench.json."""
    found = performance_section.read_results()
    shares = format_table(*performance_section.tabulate_shares(found))
    ratios = format_table(*performance_section.tabulate_ratios(found))
    return "\n\n".join((performance_section.describe_conditions(found), shares, ratios))


def write_coverage() -> str:
    """What tools/coverage/coverage.py found, from tools/results/coverage.json."""
    return coverage_report.describe_summary(_read_result("coverage")["summary"])


def write_families() -> str:
    """One line per family, from tools/results/coverage.json."""
    return format_table(*coverage_report.tabulate_families(_read_result("coverage")["rows"]))


def write_libraries() -> str:
    """What tools/coverage/libraries.py found, from tools/results/libraries.json."""
    return libraries_report.describe_summary(_read_result("libraries"))


def write_library_models() -> str:
    """One line per model of another library, from tools/results/libraries.json."""
    return format_table(*libraries_report.tabulate(_read_result("libraries")["rows"]))


def write_library_refusals() -> str:
    """What was not exported and why, from tools/results/libraries.json."""
    return format_table(*libraries_report.tabulate_refusals(_read_result("libraries")["rows"]))


def write_kits() -> str:
    """One line for each target of `deploy`."""
    rows = (
        (f"[`{name}`](kits/{name}/README.md)", target.what, target.runs)
        for name, target in TARGETS.items()
    )
    return format_table(("target, and its page", "what deploy writes", "what runs"), rows)


def write_targets() -> str:
    """Where a bundle ran, from tools/results/targets.json."""
    return format_table(*targets.tabulate(_read_result("targets")))


def write_target_summary() -> str:
    """One line per target of `deploy`, from tools/results/targets.json."""
    return format_table(*targets.summarize(_read_result("targets")))


def write_headline() -> str:
    """What a reader wants to see first, of each of tools/results."""
    coverage = _read_result("coverage")["summary"]
    bench = _read_result("bench")
    ratios = {(r["case"], r["ratio of"]): r["median"] for r in bench["results"]}
    shares = {(s["model"], s["phase"], s["op"]): s["share"] for s in bench["shares"]}
    exact = {row["target"] for row in _read_result("targets") if row["exact"]}
    ran = {row["target"] for row in _read_result("targets") if row["how"] == "ran"}
    load = _read_result("load").values()
    latency = _read_result("cpp_latency")["rows"][0]
    prefill = "float32 half (1, 32, 2048, 128) 1 thread", "times as fast as com.microsoft"
    decode = next(m for (case, _), m in ratios.items() if case == "decode half batch 1")
    layer = "1B", "prefill of 512 tokens"
    ours, theirs = (shares[*layer, op] for op in ("rotary_export", "com.microsoft"))
    speed, cover, where = (f"tools/{name}/README.md" for name in ("bench", "coverage", "targets"))
    kit = "rotary_export/deploy/kits/cpp-onnxruntime/README.md"
    rows = (
        (
            "families of transformers with every rotary call fused, `export_model`",
            f"{coverage['a_all_fused']} of {coverage['a_exported']} exported, "
            f"{coverage['a_wrong']} wrong",
            f"[coverage]({cover})",
        ),
        (
            "the same, `fuse` on the files of torch.onnx",
            f"{coverage['b_all_fused']} of {coverage['b_exported']}, {coverage['b_wrong']} wrong",
            f"[coverage]({cover})",
        ),
        (
            "of these files, failed before at sizes that were not traced",
            f"{coverage['b_failed_before']}",
            f"[coverage]({cover})",
        ),
        (
            "speed, prefill of 2048 tokens: times as fast as ONNX Runtime's op",
            f"{ratios[prefill]:.2g}",
            f"[bench]({speed})",
        ),
        (
            "decode of 1 token: time relative to ONNX Runtime's op",
            f"{decode:.2g}",
            f"[bench]({speed})",
        ),
        (
            "rope's share of a 1B decoder layer, prefill: ours, ONNX Runtime's op",
            f"{ours:.2%}, {theirs:.2%}",
            f"[bench]({speed})",
        ),
        (
            "decode step of the C++ program, relative to `run_with_iobinding`",
            f"{latency['C++ / raw']:.2g}",
            f"[C++]({kit})",
        ),
        (
            "targets on which a bundle ran; with the bits of eager",
            f"{len(ran)}; {len(exact)}",
            f"[targets]({where})",
        ),
        (
            "replies of servers under load, compared to the bit; wrong",
            f"{sum(row['requests'] for row in load):,}; {sum(row['wrong'] for row in load)}",
            f"[targets]({where})",
        ),
    )
    return format_table(("what", "measured", "page"), rows)


def write_runtimes() -> str:
    """What each release of ONNX Runtime runs, from tools/results/matrix.json."""
    return format_table(*matrix_report.tabulate_runtimes(_read_result("matrix")["runtimes"]))


def write_packages() -> str:
    """What each environment exports, from tools/results/matrix.json."""
    return format_table(*matrix_report.tabulate_packages(_read_result("matrix")["packages"]))


def write_wheel() -> str:
    """What the built wheel needs, from tools/results/wheel.json."""
    return wheel_report.describe(_read_result("wheel"))


def write_in_place() -> str:
    """How often ONNX Runtime puts an output over its input, from tools/results/in_place.json."""
    rows: dict[str, list[int]] = {}
    for model in _read_result("in_place")["models"]:
        row = rows.setdefault(model["style"], [0, 0, 0, 0])
        for index, name in enumerate(("nodes", "outputs", "eligible", "aliased")):
            row[index] += model[name]
    headers = ("attention", "nodes", "outputs", "that nothing else reads", "in place")
    return format_table(headers, [(style, *row) for style, row in rows.items()])


def write_model_export() -> str:
    """What finding and replacing costs, from tools/results/model_export.json."""
    found = _read_result("model_export")
    return (
        f"Llama with {found['layers']} layers, median of {found['rounds']}: "
        f"{found['fused_seconds']} s of processor time, {found['plain_seconds']} s as it is. "
        f"Ratio {found['ratio']} ({found['ratio_min']} to {found['ratio_max']}). "
        f"On {found['machine']['processor']}."
    )


def write_cpp_latency() -> str:
    """A decode step of the C++ program, from tools/results/cpp_latency.json."""
    found = _read_result("cpp_latency")
    machine = found["machine"]
    headers = (
        "batch_size",
        "graph",
        "against `rotary_export.load(...)`",
        "against onnxruntime's `run_with_iobinding`, bound once",
    )
    rows = (
        (
            row["batch_size"],
            row["path"],
            *(
                "{} ({} to {})".format(row[f"C++ / {peer}"], *row[f"C++ / {peer}, 95 %"])
                for peer in ("session", "raw")
            ),
        )
        for row in found["rows"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"On {machine['processor']}, {machine['cores']} cores, {versions}."
    return f"{where}\n\n{format_table(headers, rows)}"


def write_real_weights() -> str:
    """Proof and text with trained weights, from tools/results/real_weights.json."""
    found = _read_result("real_weights")
    headers, rows = measure_real.tabulate_differences(found)
    return "\n\n".join(
        (
            "On {processor}, {cores} cores.".format_map(found["machine"]),
            format_table(*measure_real.tabulate(found)),
            format_table(headers, rows) if rows else "No token differs.",
        )
    )


# The generated sections of each page.
DOCUMENTS = {
    "README.md": {"target_summary": write_target_summary, "headline": write_headline},
    "rotary_export/README.md": {"xpos_lengths": write_xpos_lengths},
    "rotary_export/bundle/README.md": {"kills": table(soak_report.tabulate_kills, "kills")},
    "rotary_export/proof/README.md": {
        "tolerances": write_tolerances,
        "proof": write_proof,
        "teeth": write_teeth,
    },
    "rotary_export/op/README.md": {"minimum_onnxruntime": write_minimum_onnxruntime},
    "rotary_export/deploy/README.md": {"kits": write_kits},
    "rotary_export/deploy/kits/cpp-onnxruntime/README.md": {
        "minimum_onnxruntime": write_minimum_onnxruntime,
        "cpp_latency": write_cpp_latency,
    },
    "tools/bench/README.md": {
        "performance": write_performance,
        "in_place": write_in_place,
        "model_export": write_model_export,
    },
    "tools/coverage/README.md": {
        "coverage": write_coverage,
        "decoders": lambda: decoders_report.describe_summary(_read_result("decoders")),
        "decoders_families": table(decoders_report.tabulate, "decoders"),
        "libraries": write_libraries,
        "libraries_models": write_library_models,
        "libraries_refusals": write_library_refusals,
        "coverage_families": write_families,
    },
    "tools/matrix/README.md": {"runtimes": write_runtimes, "packages": write_packages},
    "tools/real/README.md": {"real_weights": write_real_weights},
    "tools/soak/README.md": {"soak": write_soak},
    "tools/targets/README.md": {
        "targets": write_targets,
        "load": table(soak_report.tabulate_load, "load"),
        "attack": table(soak_report.tabulate_attack, "attack"),
    },
    "tools/wheel/README.md": {
        "wheel": write_wheel,
        "wheel_tags": table(wheel_report.tabulate_tags, "wheel"),
        "wheel_installs": table(wheel_report.tabulate_installs, "wheel"),
    },
}


def fill(document: str, text: str) -> str:
    """Return a document with its sections filled."""
    for name, write in DOCUMENTS[document].items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{document} has no section {name}")
        body = f"{begin}\n{write()}\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)
    return text


def main() -> None:
    """Fill, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    check = parser.parse_args().check
    for document in DOCUMENTS:
        path = ROOT / document
        before = path.read_text(encoding="utf-8")
        after = fill(document, before)
        if check and before != after:
            sys.exit(f"{document} is outdated: run tools/update_pages.py")
        if not check:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
