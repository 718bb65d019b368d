"""The op `rotary_export::RotaryEmbedding`: its specification and everything that implements it.

Files:
    spec.py: names, types and input checks of the op; every message.
    torch_op.py: `torch.ops.rotary_export.rotary_embedding`, eager, fake and differentiable.
    cpu_kernel.py: the op library's kernel on torch tensors.
    library.py: find and load the op library, `librotary_export.so`.
    onnx_schema.py: the op's ONNX schema, for torch's exporter and the ONNX checker.
    onnx_signature.py: what the function body of a node depends on.
    onnx_function.py: the function bodies, in standard ONNX.
    onnx_graph.py: the nodes of an ONNX graph, and of the branches in it.
    onnx_reference.py: the op for the ONNX reference evaluator.

`import rotary_export.op` registers the torch op if torch is imported already. It never imports
torch itself: a deployment with ONNX Runtime needs numpy alone, and imports `spec` and `library`.
`import rotary_export.op.torch_op` imports torch and always registers the op.
"""

import sys
from importlib import import_module

# `custom_op` exists since torch 2.4. A deployment with an older torch still uses ONNX Runtime.
if hasattr(getattr(sys.modules.get("torch"), "library", None), "custom_op"):
    import_module("rotary_export.op.torch_op")
