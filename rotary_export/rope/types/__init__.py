"""The rope types, one file each, named after the type; `rope_types.py` finds them.

Each file defines one subclass of `RopeParameters`: the record of the type. A new file here is a new
rope type; `rope/README.md` contains the recipe.
"""
