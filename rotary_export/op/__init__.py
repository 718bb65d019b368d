"""The op, once: its spec, and what implements it in torch, ONNX and onnx.reference."""
