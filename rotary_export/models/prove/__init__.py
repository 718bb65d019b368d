"""A traced model against the model: by its export, and again by `verify_model`.

- `build_graph.py`: one graph of a bundle: written in every format, and proven.
- `prove.py`: the proof of an export; it limits sizes where the graph differs from the model.
- `limited.py`: which limits of a graph its model does not have.
- `own_tables.py`: the tables of a traced model against those of the model's own functions.
- `find_difference.py`: which rotary call of a traced model is the first that differs.
- `verify_model.py`: the public function `verify_model`.

What is compared, and how closely: `proof/models/`.
"""
