"""The proof: every graph of a bundle, in every way to run it, against eager PyTorch and an oracle.

- `verify.py`: `verify`.
- `plain.py`, `plain_cases.py`: the proof of a plain bundle, and its inputs.
- `models/`: the proof of a model's bundle: its inputs, its noise, the comparison, its
  frequencies.
- `oracle.py`, `scaled_oracle.py`: the formulas once more, in float64.
- `formulas.py`: the closed form of the frequencies of every rope type.
- `comparison.py`: errors of arrays, in ulp.
- `tolerances.py`: every limit, with its reason.
- `generated.py`: tokens of a decoder, compared with the model's own.
- `report.py`: the result.
- `stored.py`: what the files of a bundle store.
- `sample_inputs.py`: inputs to time a graph with, or to show it with.
"""
