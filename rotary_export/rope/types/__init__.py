"""The rope types, one file each, named after the type; `rope/rope_types.py` finds them.

- `default.py`, `linear.py`, `dynamic.py`, `yarn.py`, `longrope.py`, `llama3.py`
- `proportional.py`: of Gemma 4; `axial.py`: of vision models

Each file defines one subclass of `RopeParameters`: the record of the type. A new file here is a new
rope type; `rope/README.md` contains the recipe.
"""
