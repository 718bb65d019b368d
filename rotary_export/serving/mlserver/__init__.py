"""MLServer, with a bundle as one of its runtimes.

engine.py: `rotary-export serve`: the server in this process.
model.py: `RotaryModel`, the `implementation` in model-settings.json.
http_front.py: inference over HTTP, in front of MLServer; the form of errors.
grpc_front.py: inference over gRPC.
metrics.py: Prometheus metrics.
"""
