"""Find the rotary embedding in anyone's ONNX file and fuse it.

- `fuse.py`: the one entry: `fuse`, which puts the steps together.
- `result.py`: `FuseResult`: what was fused, what was not and why; and how it is written.
- `write.py`: writes a model with external data, which is named by its content.
- `read.py`: reads a model, and refuses what is damaged or too new.
- `sort_nodes.py`: puts nodes in order, as ONNX requires and ONNX Runtime does not.
- `normalize.py`: flat, folded, with known shapes: the form that the rules read.
- `half_tables.py`: tables that are computed in a half type: found, and put back to float32.
- `half_frequencies.py`: frequencies that were rounded to a half type, from their closed form.
- `candidates.py`: what looks like a rotary embedding and was not replaced, with the reason.
- `values.py`: sizes, constants and attributes of values and nodes.
- `symbolic/`: what each channel is computed from, and whether that is a rotation.
- `rules/`: the rewrite rules, and the nodes that they write.
- `operators/`: attention and norms in ONNX's own operators.
- `check/`: runs the model before and after, and compares.
"""
