"""A traced program in the forms that torch.onnx translates and ONNX Runtime runs.

- `adapt_program.py`: START HERE: what is changed.
- `attention.py`: attention that torch broadcasts in more ways than ONNX.
- `bools.py`: operators on bools, as logic or as numbers.
- `composites.py`: composite operators, without a decomposition of the whole program.
- `complex_pairs.py`: complex numbers as pairs of real ones; ONNX has no others.
- `pair_rules.py`: how each operator is computed from pairs.
- `pair_moves.py`: those operators that move or choose elements.
- `pair_editor.py`: computes with pairs.
- `floor_division.py`: floor division of sizes that may be negative.
- `graph_edit.py`: new nodes in the graph of a program.
"""
