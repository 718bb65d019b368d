"""How long it takes.

- `timing.py`: interleaved runs, medians and their uncertainty, on a noisy machine.
- `machine.py`: what a measurement was made on.
- `benchmark.py`: `rotary-export bench`.
"""
