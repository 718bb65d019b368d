"""Bundles and ONNX files to damage, and how they are damaged: at random, with the right hashes."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, HEADS, CHANNELS = 16, 2, 8
NUMBERS = (-1, 0, 1, 2, 17, 2**31, 2**63 - 1, 2**63, 10**30, 1.5, -0.0)
TEXTS = ("", "x", "\x1b[31mred", "\ud800", "a\nb", "../outside/canary", "/etc/hostname", "9" * 30,
         "0 * n", "n + n", "3 * seq_len", "\x00", "¼", "nan", "float32", "int64", "A" * 5000,
)  # fmt: skip
VALUES = (None, True, [], {}, [[]], [{}], {"": None}, *NUMBERS, *TEXTS)


# ---- what is damaged


def make_foreign(file: Path) -> None:
    """Write an ONNX file with a rotation of primitives, and weights in a file of their own."""
    rng = np.random.default_rng(0)
    angles = np.outer(np.arange(ROWS), 10000.0 ** -np.linspace(0, 0.9, CHANNELS // 2))
    wide = np.tile(angles, 2).astype(np.float32)
    stored = {
        "w": rng.standard_normal((CHANNELS, CHANNELS), dtype=np.float32),
        "cos": np.cos(wide),
        "sin": np.sin(wide),
        "low": np.array([0]),
        "half": np.array([CHANNELS // 2]),
        "high": np.array([2**31 - 1]),
        "last": np.array([-1]),
        "heads": np.array([1]),
    }
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "w"], ["q"], name="project"),
        make("Gather", ["cos", "position_ids"], ["c"]),
        make("Gather", ["sin", "position_ids"], ["s"]),
        make("Unsqueeze", ["c", "heads"], ["cos4"]),
        make("Unsqueeze", ["s", "heads"], ["sin4"]),
        make("Slice", ["q", "low", "half", "last"], ["first"]),
        make("Slice", ["q", "half", "high", "last"], ["second"]),
        make("Neg", ["second"], ["negative"]),
        make("Concat", ["negative", "first"], ["turned"], axis=-1),
        make("Mul", ["q", "cos4"], ["left"]),
        make("Mul", ["turned", "sin4"], ["right"]),
        make("Add", ["left", "right"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    dims = ["batch", HEADS, "seq", CHANNELS]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            info("x", TensorProto.FLOAT, dims),
            info("position_ids", TensorProto.INT64, ["batch", "seq"]),
        ],
        [info("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, file, save_as_external_data=True, location="weights.bin", size_threshold=64)


def make_subjects(folder: Path) -> None:
    """Write what is damaged: two plain bundles, a fused one, and a file to fuse."""
    import rotary_export
    from rotary_export.models.fused.bundle import write_fused_bundle

    for name, more in (("plain", {}), ("static", {"static": True, "batch_size": 2})):
        module = rotary_export.RotaryEmbedding(CHANNELS, use_xpos=name == "static")
        rotary_export.export(module, folder / name, max_seq_len=ROWS, num_heads=HEADS, **more)
    (folder / "file").mkdir()
    make_foreign(folder / "file" / "model.onnx")
    result = rotary_export.fuse(folder / "file" / "model.onnx")
    write_fused_bundle(result, folder / "fused")
    (folder / "outside").mkdir()
    (folder / "outside" / "canary").write_bytes(bytes(4096))


# ---- how it is damaged


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the path of each part of a JSON value."""
    places = [path] if path else []
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places += list_places(value[key], (*path, key))
    return places


def damage_json(draw: random.Random, content: Any) -> None:
    """Change, remove, add or move one part of a JSON value."""
    places = list_places(content)
    path = draw.choice(places)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    how = draw.random()
    if how < 0.6:
        parent[path[-1]] = draw.choice(VALUES)
    elif how < 0.75:
        del parent[path[-1]]
    elif how < 0.85 and isinstance(parent, dict):
        parent[str(draw.choice(TEXTS))] = parent.pop(path[-1])
    elif how < 0.93:
        other = content
        for key in draw.choice(places):
            other = other[key]
        parent[path[-1]] = other
    elif isinstance(parent, list):
        parent.extend(parent[:1] * draw.randint(1, 3))
    else:
        value: Any = draw.choice(VALUES)
        for _ in range(draw.choice((10, 80, 500))):
            value = [value]
        parent[path[-1]] = value


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    content = bytearray(data)
    at = draw.randrange(max(len(content), 1))
    how = draw.random()
    if how < 0.5 and content:
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif how < 0.65:
        del content[at:]
    elif how < 0.8:
        del content[at : at + draw.randint(1, 64)]
    else:
        content[at:at] = draw.randbytes(draw.randint(1, 32))
    return bytes(content)


def list_messages(message: Any) -> list[tuple[Any, Any]]:
    """List the fields of a protobuf message, and of those in it: message and field."""
    found = []
    for descriptor, value in message.ListFields():
        found.append((message, descriptor))
        if descriptor.type == descriptor.TYPE_MESSAGE:
            parts = [value] if hasattr(value, "ListFields") else value
            for part in parts:
                found += list_messages(part)
    return found


def damage_onnx(draw: random.Random, data: bytes) -> bytes:
    """Change one field of an ONNX file, or make a tensor's data external."""
    model = onnx.load_model_from_string(data)
    if draw.random() < 0.2 and model.graph.initializer:
        tensor = draw.choice(model.graph.initializer)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        location = ("../outside/canary", "canary", "x/../../outside/canary", "", "model.onnx",
                    str(Path.cwd() / "outside" / "canary"), "weights.bin")  # fmt: skip
        facts = {"location": draw.choice(location), "offset": "0", "length": "64"}
        if draw.random() < 0.3:
            facts[draw.choice([*facts])] = str(draw.choice(NUMBERS))
        for key, value in facts.items():
            tensor.external_data.add(key=key, value=value)
        return bytes(model.SerializeToString())
    message, descriptor = draw.choice(list_messages(model))
    is_list = not hasattr(descriptor, "is_repeated") or descriptor.is_repeated
    value = getattr(message, descriptor.name)
    how = draw.random()
    try:
        if how < 0.2:
            message.ClearField(descriptor.name)
        elif is_list and len(value):
            index = draw.randrange(len(value))
            if how < 0.5:
                del value[index]
            elif descriptor.type == descriptor.TYPE_MESSAGE:
                value.add().CopyFrom(value[index])
            else:
                value[index] = _draw_scalar(draw, value[index])
        elif not is_list and descriptor.type != descriptor.TYPE_MESSAGE:
            setattr(message, descriptor.name, _draw_scalar(draw, value))
    except (ValueError, TypeError, OverflowError):  # the field has no such value
        message.ClearField(descriptor.name)
    return bytes(model.SerializeToString())


def _draw_scalar(draw: random.Random, value: Any) -> Any:
    if isinstance(value, bytes):
        return damage_bytes(draw, value)
    if isinstance(value, str):
        return draw.choice([text for text in TEXTS if text != "\ud800"])
    if isinstance(value, float):
        return draw.choice((0.0, -1.5, float("nan"), float("inf")))
    return draw.choice((-1, 0, 1, 2, 3, 7, 11, 1000, 2**31 - 1))


def damage_zip(draw: random.Random, data: bytes) -> bytes:
    """Change one part of a zip of torch; JSON as JSON."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(content, "w") as new:
        names = old.namelist()
        chosen = draw.choice(names)
        for name in names:
            part = old.read(name)
            if name == chosen and draw.random() < 0.1:
                continue
            if name == chosen and name.endswith(".json"):
                value = json.loads(part)
                damage_json(draw, value)
                part = json.dumps(value).encode()
            elif name == chosen and not name.endswith((".pkl", ".py")):
                part = damage_bytes(draw, part)
            new.writestr(name, part)
        if draw.random() < 0.1:
            top, added = names[0].partition("/")[0], draw.choice(("extra/x", "a\x1b[31m"))
            new.writestr(f"{top}/{added}", b"")
    return content.getvalue()


def damage(draw: random.Random, bundle: Path, is_bundle: bool) -> str:
    """Damage one file of a folder; the manifest gets its new hash.

    Returns:
        What was done.
    """
    if is_bundle and draw.random() < 0.45:
        text = (bundle / "manifest.json").read_text()
        if draw.random() < 0.2:
            (bundle / "manifest.json").write_bytes(damage_bytes(draw, text.encode()))
            return "bytes of the manifest"
        manifest = json.loads(text)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            damage_json(draw, manifest)
        text = json.dumps(manifest)
        if draw.random() < 0.05:
            text = text.replace(": 1", ": 1e999", 1)
        (bundle / "manifest.json").write_text(text)
        return "the manifest"
    files = sorted(f.name for f in bundle.iterdir() if f.name != "manifest.json")
    name = draw.choice(files)
    file = bundle / name
    data = file.read_bytes()
    if is_bundle and draw.random() < 0.05:  # elsewhere a link is what the user named
        file.unlink()
        file.symlink_to(draw.choice((bundle.parent / "outside" / "canary", "nowhere", name)))
        return f"{name} is a symlink"
    if draw.random() < 0.4:
        data, how = damage_bytes(draw, data), "bytes"
    elif file.suffix == ".onnx":
        data, how = damage_onnx(draw, data), "a field"
    elif file.suffix in (".pt", ".pt2"):
        data, how = damage_zip(draw, data), "a part"
    else:
        data, how = damage_bytes(draw, data), "bytes"
    file.write_bytes(data)
    if is_bundle:
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"][name] = hashlib.sha256(data).hexdigest()
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    return f"{how} of {name}"
