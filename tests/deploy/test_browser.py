"""The kit for browsers: its page in headless Chromium, opened by its own check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bundles import ROWS
from helpers.javascript_kits import (
    BUNDLES,
    MODEL_SHAPES,
    NEWEST,
    OLDEST,
    SHAPES,
    check_pins,
    find_allowed,
    make_case,
    make_kit,
    name_shapes,
    run_node,
    save_case,
)
from helpers.target_runs import TargetRun, record

NAME = "browser"


def open_page(kit: Path, *folders: str) -> list[dict[str, Any]]:
    """Return the page's report of each folder."""
    done = run_node(NAME, kit, "check.mjs", *folders)
    assert done.stderr == ""
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["inputs"] for report in reports] == list(folders)
    assert done.returncode == any(report["state"] != "passed" for report in reports)
    return reports


def run_cases(name, shapes, tolerance, dtype, folder: Path) -> list[dict[str, Any]]:
    """Compare with eager; return the page's reports."""
    kit = make_kit(NAME, name, folder)
    cases = {f"case-{batch}x{length}": (batch, length) for batch, length in shapes}
    largest = {}
    for case, shape in cases.items():
        inputs, expected = make_case(name, shape)
        save_case(kit / case, inputs, expected)
        largest[case] = {k: np.abs(v.astype(np.float64)).max() for k, v in expected.items()}
    reports = open_page(kit, *cases)
    allowed = find_allowed(tolerance, dtype)
    for report in reports:
        assert report["state"] == "passed", report
        assert report["version"] == NEWEST
        assert {r["name"] for r in report["results"]} == largest[report["inputs"]].keys()
        for result in report["results"]:
            most = allowed * largest[report["inputs"]][result["name"]]
            assert result["allowed"] == pytest.approx(most)
            assert result["maxError"] <= most
            assert result["exact"] or most > 0
            assert result["type"] == dtype
    return reports


def record_reports(graph, dtype, shapes, reports, note="") -> None:
    results = [result for report in reports for result in report["results"]]
    record(
        TargetRun(
            "browser",
            f"onnxruntime-web {NEWEST}, Chromium {reports[0]['chromium'].split('.')[0]}",
            graph,
            "ran",
            "portable",
            [dtype],
            name_shapes(shapes),
            max(result["maxError"] for result in results),
            all(result["exact"] for result in results),
            note,
        )
    )


@pytest.mark.parametrize("dtype", BUNDLES)
def test_rotate_is_eager(dtype, tmp_path):
    reports = [
        report
        for name, tolerance in BUNDLES[dtype].items()
        for report in run_cases(name, SHAPES, tolerance, dtype, tmp_path)
    ]
    record_reports("rotate", dtype, SHAPES, reports, "WebAssembly; registers no op library")


def test_model_is_eager(tmp_path):
    reports = run_cases("model", MODEL_SHAPES, "model", "float32", tmp_path)
    record_reports("model", "float32", MODEL_SHAPES, reports, "llama, two layers")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_kit(NAME, "plain", tmp_path_factory.mktemp("browser"))


def test_oldest_runtime(tmp_path):
    kit = make_kit(NAME, "plain", tmp_path)
    _use_oldest(kit, tmp_path / "packages")
    (report,) = open_page(kit, "example")
    assert report["state"] == "passed"
    assert report["version"] == OLDEST


def _use_oldest(kit: Path, packages: Path) -> None:
    """Replace onnxruntime-web; check.mjs needs the other packages."""
    installed = (kit / "node_modules").resolve()
    (kit / "node_modules").unlink()
    (kit / "node_modules").mkdir()
    for package, place in {
        "playwright-core": installed,
        "onnxruntime-web": installed.parent / "oldest" / "node_modules",
    }.items():
        (kit / "node_modules" / package).symlink_to(place / package)


def test_pins_are_what_is_installed(plain):
    check_pins(plain, "onnxruntime-web")


def test_scripts_match_the_page(plain):
    scripts = json.loads((plain / "package.json").read_text())["scripts"]
    assert scripts == {"start": "node serve.mjs", "test": "node check.mjs"}


# ---- the drawing, and the server

DRAWING = """
import { chromium } from "playwright-core";
import { startServer } from "./serve.mjs";
const server = await startServer(import.meta.dirname, 0);
const address = `http://127.0.0.1:${server.address().port}`;
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const browser = await chromium.launch({ executablePath });
try {
  const page = await browser.newPage();
  const requests = [];
  page.on("request", (request) => requests.push(request.url()));
  await page.goto(`${address}/?inputs=drawn`);
  await page.waitForSelector("svg");
  const rows = await page.locator("tbody tr").allInnerTexts();
  const [tensor, batch, head] = await page.locator("select").all();
  await tensor.selectOption("key");
  await batch.selectOption("2");
  await head.selectOption("1");
  const arrow = (name) => page.locator(`svg .${name}`).evaluateAll((all) =>
    all.map((path) => -path.transform.baseVal[0].angle));
  const texts = await page.locator("svg text").allTextContents();
  const fetched = async (path) => {
    const response = await fetch(address + path);
    return [response.status, response.headers.get("content-type")];
  };
  console.log(JSON.stringify({
    rows, texts, before: await arrow("before"), after: await arrow("after"),
    heads: await head.locator("option").count(),
    foreign: requests.filter((url) => !url.startsWith(address) && !url.startsWith("data:")),
    wasm: await fetched("/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm"),
    outside: await fetched("/..%2fsecret"), missing: await fetched("/missing"),
  }));
} finally {
  await browser.close();
  server.close();
}
"""


def test_drawing(plain):
    """The angles of the arrows of key, batch 2, head 1 are those of its pairs, (i, i + 8)."""
    inputs, expected = make_case("plain", (3, 5))
    save_case(plain / "drawn", inputs, expected)
    (plain.parent / "secret").touch()
    (plain / "drawing.mjs").write_text(DRAWING)
    done = run_node(NAME, plain, "drawing.mjs")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for name, key in {"before": inputs["key"], "after": expected["key_out"]}.items():
        x = key[2, 1].astype(np.float64)
        wanted = np.degrees(np.arctan2(x[:, 8:16], x[:, :8])).ravel()
        np.testing.assert_allclose(seen[name], wanted, atol=1e-3)
    ids = inputs["position_ids"][2]
    angles = np.degrees(ids[:, None] * 10000.0 ** (-np.arange(0, 16, 2) / 16))
    turns = [(round(angle) + 180) % 360 - 180 for angle in angles.ravel()]
    labels = [int(text[:-1]) for text in seen["texts"] if text.endswith("°")]
    assert all(abs(a - b) in (0, 1, 359, 360) for a, b in zip(labels, turns, strict=True))
    assert [t for t in seen["texts"] if t.startswith("position")] == [f"position {i}" for i in ids]
    assert seen["heads"] == 2
    assert [row.split("\t")[-1] for row in seen["rows"]] == ["pass", "pass"]
    assert seen["foreign"] == []
    assert seen["wasm"] == [200, "application/wasm"]
    assert seen["outside"] == seen["missing"] == [404, None]


def test_a_port_in_use(plain):
    program = """
        import { startServer } from "./serve.mjs";
        import { spawnSync } from "node:child_process";
        const server = await startServer(import.meta.dirname, 0);
        const done = spawnSync(process.execPath, ["serve.mjs", `${server.address().port}`]);
        console.log(done.status, String(done.stderr));
        server.close();"""
    done = run_node(NAME, plain, "--input-type=module", "-e", program)
    status, message = done.stdout.split(" ", 1)
    assert status == "1"
    assert message.startswith("error: listen EADDRINUSE")
    assert "another port: node serve.mjs PORT" in message


# ---- what goes wrong


def test_bad_inputs_are_shown(plain):
    inputs, expected = make_case("plain", (1, 3))
    changes = {
        "id": {"position_ids": np.array([[0, ROWS, 0]])},
        "type": {"query": inputs["query"].astype(np.float16)},
        "shape": {"key": inputs["key"][:, :, :2]},
    }
    for name, change in changes.items():
        save_case(plain / name, {**inputs, **change}, expected)
    off = expected["key_out"].copy()
    off[0, 1, 2, 23] += 0.5
    save_case(plain / "off", inputs, {**expected, "key_out": off})
    save_case(plain / "half", inputs, {})
    identifier, dtype, shape, other, half, none = open_page(plain, *changes, "off", "half", "none")
    assert identifier["state"] == "error"
    assert identifier["verdict"] == "position_ids must be in [0, 32), got 32 at batch 0, row 1"
    assert dtype["verdict"] == "query must be float32, got float16"
    assert shape["verdict"].startswith(
        "key must have shape (batch_size, num_kv_heads, seq_len, 24)"
    )
    assert other["state"] == "failed"
    assert [result["passed"] for result in other["results"]] == [True, False]
    assert other["results"][1]["maxError"] == pytest.approx(0.5, rel=1e-6)
    assert half["verdict"] == "half/expected/query_out.npy can't be read: 404"
    assert none["verdict"] == "none/query.npy can't be read: 404"


def test_a_broken_kit_is_shown(plain, tmp_path):
    kit = Path(shutil.copytree(plain, tmp_path / "kit", symlinks=True))
    with (kit / "bundle" / "rotate.onnx").open("ab") as file:
        file.write(b"\0")
    (report,) = open_page(kit, "example")
    assert report["state"] == "error"
    assert report["verdict"].startswith("rotate.onnx is not the file that was exported: its sha256")
    shutil.rmtree(kit / "bundle")
    (report,) = open_page(kit, "example")
    assert report["verdict"] == "bundle/manifest.json can't be read: 404"
    _use_oldest(kit, tmp_path)
    (kit / "node_modules" / "onnxruntime-web").unlink()
    (report,) = open_page(kit, "example")
    assert report["verdict"] == "onnxruntime-web is not installed: npm ci --ignore-scripts"
    (kit / "node_modules" / "playwright-core").unlink()
    done = run_node(NAME, kit, "check.mjs")
    assert done.returncode == 1
    assert done.stderr == "error: playwright-core is not installed: npm ci --ignore-scripts\n"
