"""`load_decoder`: from a bundle's folder to a `Decoder`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rotary_export.bundle.json_file import read_json_object
from rotary_export.bundle.manifest import DECODER, EMBED, ENCODER, check_files, read_manifest
from rotary_export.runtime.decoder.decoder import START, Decoder
from rotary_export.runtime.decoder.settings import FILE
from rotary_export.runtime.load import load
from rotary_export.runtime.ort import OrtSession

_CONFIG = "config.json"


def load_decoder(
    bundle_dir: str | os.PathLike[str],
    graph: str | None = None,
    *,
    providers: str | Sequence[str] = "auto",
    use_op_library: bool | str = "auto",
    require_fused: bool = False,
    allow_failed: bool = False,
) -> Decoder:
    """Load a language model that was exported with a key/value cache.

    Args:
        bundle_dir: The bundle's folder.
        graph: As `load`, like the other arguments.
        providers: As `load`.
        use_op_library: As `load`.
        require_fused: As `load`.
        allow_failed: As `load`.

    Returns:
        The decoder; ONNX Runtime runs it.

    Raises:
        RotaryExportError: As `load`, or the graph has no key/value cache.
    """
    path = Path(bundle_dir)
    manifest = read_manifest(path)

    def open_graph(name: str | None, fused: bool) -> OrtSession:
        session = load(
            path,
            name,
            providers=providers,
            use_op_library=use_op_library,
            require_fused=fused,
            allow_failed=allow_failed,
        )
        assert isinstance(session, OrtSession)
        return session

    has_encoder = ENCODER in manifest.graphs
    session = open_graph(DECODER if graph is None and has_encoder else graph, require_fused)
    encoder = open_graph(ENCODER, require_fused) if has_encoder else None
    embed = open_graph(EMBED, False) if EMBED in manifest.graphs else None
    given = [name for name in (FILE, _CONFIG) if name in manifest.files]
    check_files(path, manifest, given)
    # A model's own config names its last token, where there is no generation config.
    files = [read_json_object(path / name) for name in given]
    generation = files[0] if files else {}
    if has_encoder and generation.get(START) is None:
        found = (each.get(name) for each in files for name in (START, "bos_token_id"))
        generation[START] = next((token for token in found if token is not None), None)
    return Decoder(session, manifest.config, generation, embed, encoder)
