"""MLServer, with a bundle as one of its runtimes.

engine.py: `rotary-export serve`: the server in this process.
model.py: `RotaryModel`, the `implementation` in model-settings.json.
http_guard.py: limits of HTTP bodies, and the form of errors.
metrics.py: Prometheus metrics.
"""
