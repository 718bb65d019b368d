"""Ask a server of the Open Inference Protocol; run by an environment that has tritonclient.

python ask_server.py http|http-binary|grpc ADDRESS MODEL REQUESTS.npz REPLIES.npz

Arrays are "INDEX NAME". All requests are sent at once, each by a client of its own; what was
refused is printed, as JSON, by index.
"""

import importlib
import json
import sys
import threading

import numpy as np

DATATYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "int64": "INT64"}


def main(protocol, address, model, requests_file, replies_file):
    module = importlib.import_module(f"tritonclient.{protocol.removesuffix('-binary')}")
    over_http = protocol != "grpc"
    options = {"binary_data": protocol == "http-binary"} if over_http else {}
    requests, replies, refused = {}, {}, {}
    with np.load(requests_file) as arrays:
        for key in arrays.files:
            index, name = key.split()
            requests.setdefault(index, {})[name] = arrays[key]
    barrier = threading.Barrier(len(requests))

    def ask(index, arrays):
        client = module.InferenceServerClient(address)
        outputs = [tensor["name"] for tensor in read_metadata(client)["outputs"]]
        inputs = []
        for name, array in arrays.items():
            inputs.append(module.InferInput(name, array.shape, DATATYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array, **options)
        wanted = [module.InferRequestedOutput(name, **options) for name in outputs]
        barrier.wait()
        try:
            answer = client.infer(model, inputs, outputs=wanted, request_id=index)
        except module.InferenceServerException as error:
            refused[index] = error.message()
            return
        response = answer.get_response()
        assert index == (response["id"] if over_http else response.id)
        for name in outputs:
            replies[f"{index} {name}"] = answer.as_numpy(name)

    def read_metadata(client):
        if over_http:
            return client.get_model_metadata(model)
        return client.get_model_metadata(model, as_json=True)

    threads = [threading.Thread(target=ask, args=item) for item in requests.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.savez(replies_file, **replies)
    print(json.dumps(refused))


if __name__ == "__main__":
    main(*sys.argv[1:])
