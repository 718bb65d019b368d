"""Which calls of a model apply a rotary embedding, and the op in their place.

- `candidates.py`: functions that may apply a rotary embedding, found by their names.
- `names.py`: which names of functions and Python modules are looked at.
- `reachable.py`: the classes, Python modules and functions that a model is made of.
- `redirect.py`: calls of functions redirected, wherever a model holds them.
- `calls.py`: records the calls that a model makes of candidates.
- `axes.py`: how the dimensions of a rotated tensor map onto those of the op.
- `lowering.py`: how a call maps onto the op: tensors, axes, layout, channels; its tables.
- `probe.py`: finds the lowering of a call by calling the function with random tensors.
- `replacement.py`: runs a model once and lists what will be replaced, and why not the rest.
- `replace.py`: the op in the place of the functions, for as long as a context lasts.
"""
