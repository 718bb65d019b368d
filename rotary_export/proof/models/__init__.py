"""The proof of whole models, which have no float64 oracle: they are compared with themselves.

plan.py          which cases a model is proven with
input_values.py  where the values of an input come from
cases.py         the inputs of a case, and what is compared of its outputs
reference.py     the model itself: what it returns for each case
noise.py         how much rounding moves a model's outputs
compare.py       every format and runtime against the model itself
far_tables.py    the tables of an ONNX file up to the last position
frequencies.py   its inv_freq against the formula of the rope type that its config names
"""
