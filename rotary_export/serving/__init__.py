"""Serving of a bundle over the Open Inference Protocol.

core.py: `ServedModel`, which checks each request by itself, then runs several together.
batcher.py: adaptive batching.
messages.py: the protocol's messages over HTTP and gRPC.
options.py: the options, each stated once, and the engines.
ports.py: the addresses of a server.
metrics.py: names of the metrics.
mlserver/: the default engine; ray/: several processes or machines.
"""
