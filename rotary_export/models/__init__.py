"""Whole models: find their rotary calls, replace these by the op, export, prove.

- `export_model.py`: the public function `export_model`; puts the steps together.
- `source.py`: loads a model that the command line names.
- `hub.py`: fetches a model of the Hugging Face hub.
- `arguments.py`: a model's arguments and results as named tensors.
- `dim_names.py`: names the sizes that stay dynamic.
- `describe_inputs.py`: inputs as the manifest has them, and the sizes that they are traced at.
- `convert.py`: a copy of a model in another floating-point type.
- `configs.py`: lengths that a model's transformers configs contain.
- `analyze.py`: what an export needs to know of a model; `find_rotary_calls` for `--dry-run`.
- `write_graph.py`: traces a model and writes every format.
- `write_onnx.py`: the ONNX file, with large weights in a file beside it.
- `error_text.py`: an exporter's error in one line, with its place in the model.
- `find/`: which functions apply a rotary embedding, what they compute, and their replacement.
- `trace/`: `torch.export`, guards, size limits, patches while tracing, the snapshot.
- `decoder/`: causal language models: their caches, their example inputs, their files.
- `fused/`: an ONNX file that was fused, or any other, where a bundle is asked for.
- `prove/`: a traced model against the model: by its export, and again by `verify_model`.
"""
