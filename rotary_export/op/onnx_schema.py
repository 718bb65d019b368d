"""The op's ONNX schema, for torch's exporter and the ONNX checker."""

from __future__ import annotations

import importlib

from onnx import defs

from rotary_export.op import spec

_ONNX_TYPE = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float64": "tensor(double)",
}


def register_schema() -> None:
    """Register the schema with `onnx.defs`, once per process."""
    if defs.has(spec.OP_TYPE, spec.DOMAIN):
        return
    # It can't be imported when two domains have an op of one name, as ai.onnx and ours then do.
    importlib.import_module("onnx.reference.op_run")
    parameter = defs.OpSchema.FormalParameter
    optional = defs.OpSchema.FormalParameterOption.Optional
    types = {"X": "T", "key": "T", "position_ids": "tensor(int64)", "Y": "T", "key_out": "T"}
    inputs = [
        parameter(name, types.get(name, "C"))
        if index < spec.REQUIRED_INPUTS
        else parameter(name, types.get(name, "C"), param_option=optional)
        for index, name in enumerate(spec.INPUTS)
    ]
    outputs = [parameter("Y", "T"), parameter("key_out", "T", param_option=optional)]
    all_types = list(_ONNX_TYPE.values())
    schema = defs.OpSchema(
        spec.OP_TYPE,
        spec.DOMAIN,
        spec.OP_VERSION,
        doc="Rotary position embedding of X and, in the same call, of key.",
        inputs=inputs,
        outputs=outputs,
        type_constraints=[
            ("T", all_types, "X, key and the outputs."),
            ("C", all_types, "The tables: T, or float."),
        ],
        attributes=[
            defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT, required=False)
            for name in spec.ATTRIBUTES
        ],
    )
    defs.register_schema(schema)
