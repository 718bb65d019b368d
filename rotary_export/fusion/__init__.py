"""Find the rotary embedding in anyone's ONNX file and fuse it; `fuse.py` puts the steps together.

`channels.py` works out what each channel of a value is computed from, with `operators.py` and
`sums.py`; `rotation.py` recognises a rotation in that, `build.py` writes its node, `rules.py` holds
the rewrite rules, `prepare.py` readies a graph for them, `join.py` makes query and key one node,
`feeds.py` and `check.py` run the model before and after.
"""
