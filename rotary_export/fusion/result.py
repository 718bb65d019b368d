"""What `fuse` returns: the model, what was replaced, what was not and why, what was compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnxscript import ir

from rotary_export.bundle.atomic import check_file, write_files
from rotary_export.bundle.manifest import DATA_SUFFIX
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.fusion.candidates import NotReplaced
from rotary_export.fusion.check.compare import Check
from rotary_export.fusion.write import list_data, write_external


class NothingFusedError(CheckFailedError):
    """No rotary embedding was replaced.

    Attributes:
        why: The candidates, each with the check that refused it.
    """

    def __init__(self, message: str, why: Sequence[NotReplaced] = ()) -> None:
        super().__init__(message)
        self.why = tuple(why)


@dataclass(frozen=True)
class FuseResult:
    """A fused model, compared with what it was.

    Attributes:
        model: With `rotary_export::RotaryEmbedding` nodes and their bodies; where the source had
            external data, it refers to the same files.
        folder: Of the external data; None: the model contains its weights.
        sources: Files that the model was read from, which `save` never writes.
        nodes: Rotary nodes in the model; a node with a key does two calls.
        fused: How each call was written before, by the name of its output.
        why: Candidates that were not replaced, each with the check that refused it, and the
            nearest rotation that it could have been; and nodes that were examined by name.
        check: What was compared, at which shapes; nothing after a dry run.
        half_tables: The half type in which the model computed the tables of a call, by the name of
            its output. In `model` they are float32, except after a dry run without
            `float32_tables`.
        narrowest: As of `find_narrowest_types`.
    """

    model: onnx.ModelProto
    folder: Path | None
    sources: tuple[Path, ...]
    nodes: int
    fused: Mapping[str, str]
    why: tuple[NotReplaced, ...]
    check: Check
    half_tables: Mapping[str, str]
    narrowest: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as values that JSON can express."""
        return {
            "calls_fused": len(self.fused),
            "nodes": self.nodes,
            "fused": [{"output": name, "was": was} for name, was in self.fused.items()],
            **describe_why(self.why),
            "compared": [
                {
                    **asdict(row.shape),
                    "runtime": row.runtime,
                    "before": row.run_mode,
                    "output": row.output,
                    "max_abs": row.error.max_abs,
                    "ulp": row.error.max_ulp,
                    "allowed": row.allowed,
                }
                for row in self.check.comparisons
            ],
            "not_compared": self.check.skipped,
            "half_tables": dict(self.half_tables),
            "notes": self.check.notes,
        }

    def save(self, out: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the model; it appears whole or not at all.

        Args:
            out: The file. External data is written beside it, into `<file name>.<hash>.data`. The
                hash is of its content, so that a file never reads the data of another.
            force: Replace an existing file, and its data.

        Returns:
            Its absolute path.

        Raises:
            RotaryExportError: It exists, is what the model was read from, or can't be written; or
                the model was not compared.
        """
        self.check_compared()
        path = Path(out).absolute()
        check_out(path, force, self.sources)
        with write_files(path, list_data, self.sources) as staging:
            if self.folder is None:
                self.write(staging / path.name)
            else:
                write_external(self._read(), staging / path.name)
        return path

    def write(self, file: Path) -> None:
        """Write the model into a bundle that is being made, and its external data beside it."""
        if self.folder is None:
            file.write_bytes(self.model.SerializeToString())
        else:
            ir.save(self._read(), file, external_data=f"{file.name}{DATA_SUFFIX}")

    def _read(self) -> ir.Model:
        model = ir.serde.deserialize_model(self.model)
        ir.external_data.set_base_dir(model.graph, self.folder or "")
        return model

    def check_compared(self) -> None:
        """Refuse to write a model that was not compared.

        Raises:
            RotaryExportError: It is of a dry run.
        """
        if not self.check.comparisons:
            raise RotaryExportError("a dry run can't be written: the model was not compared")


def describe_why(why: Sequence[NotReplaced]) -> dict[str, Any]:
    """Return what was not replaced as values that JSON can express."""
    return {
        "calls_not_replaced": sum(each.candidate for each in why),
        "not_replaced": [asdict(each) for each in why],
    }


def check_out(path: Path, force: bool, sources: Sequence[Path]) -> None:
    """Refuse to replace an existing file without `force`, and a source always.

    Raises:
        RotaryExportError: It exists, or can't be written.
    """
    check_file(path, force=True)
    if any(path.exists() and s.exists() and path.samefile(s) for s in sources):
        raise RotaryExportError(f"{path} is read from: the input is never replaced")
    check_file(path, force)
