"""Serving of a bundle over the Open Inference Protocol.

core.py: `ServedModel`, which checks each request by itself, then runs several together.
interface.py: `Interface`: the inputs and outputs in the protocol's words, without the model.
batcher.py: adaptive batching.
messages.py: the protocol's messages over HTTP and gRPC.
json_text.py: JSON, by orjson. json_workers.py: large JSON, in processes of their own.
http.py: inference over HTTP: limits of the body, reading, answer.
size_limits.py: the largest request of a bundle.
options.py: the options, each stated once, and the engines.
ports.py: the addresses of a server.
metrics.py: names of the metrics.
mlserver/: the default engine; ray/: several processes or machines.
"""
