"""Every private name of torch, transformers and the servers that the package touches.

quiet.py              loggers and warnings of torch and its exporters
onnx_export.py        all that torch.onnx and onnxscript need not do
onnx_translations.py  the registry of torch.onnx's translations
onnx_rewriter.py      the pattern matcher of onnxscript's rewriter
onnx_decompositions.py  the decomposition of a program by torch.onnx
onnx_promotion.py     the casts that torch.onnx adds where types are mixed
onnx_evaluator.py     the operators of onnx.reference, on half types
ort_binding.py        ONNX Runtime's IO binding, called for each token
dispatch.py           torch.utils._python_dispatch: what sees every operator, and its schema
pytree.py             torch.utils._pytree: nested arguments as flat lists
sizes.py              symbolic sizes of a traced program: its shape environment, guards and ranges
export_dims.py        the dimensions by which torch.export is told what may vary
archives.py           the zip archives of torch: what is in them, a program loaded
programs.py           torch.export's programs: a copy, the schema of an operator
inductor.py           AOTInductor: compile, package, load
modules.py            the registries of torch.nn.Module
script.py             functions compiled by torch.jit.script: their source, and their calls
transformers.py       model classes of a config, the kernel of experts
einx.py               elementwise functions of einx, with symbolic sizes
x_transformers.py     the cache of its decoders
foreign_rope.py       the RotaryEmbedding of zeta and x-transformers
mlserver.py           the HTTP application of an MLServer, its gRPC service, their settings
uvicorn.py            the protocol of a connection
ray.py                settings of ray.init that are not public
glibc.py              memory that was freed

tests/compat calls each function on a module of a few lines: when a new release moves a name, that
test fails and names it.
"""
