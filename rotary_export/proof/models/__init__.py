"""The proof of whole models, which have no float64 oracle: they are compared with themselves.

cases.py        inputs of a model at any size
noise.py        how much rounding moves a model's outputs
compare.py      every format and runtime against the model itself
frequencies.py  its inv_freq against the formula of the rope type that its config names
"""
