"""`deploy`: a bundle and what another language, a browser or a server needs to run it.

deploy.py: `deploy`, which writes the folder.
targets.py: the targets, one entry each.
page.py: the page of a kit, for the bundle beside it.
package_copy.py: a copy of this package, for servers.
example.py: the inputs of the example.
cpp_onnxruntime.py: the sources of the op library, for C++ with ONNX Runtime.
signature.py: `signature.txt`, for C++ with libtorch.
inline.py: `GRAPH.inlined.onnx`, for OpenVINO and tract.
genai.py: `genai_config.json`, for onnxruntime-genai.
transformers_js.py: the folder that transformers.js opens, for Node.js and browsers.
mlserver.py: `model-settings.json`, for MLServer.
triton.py: the model repository, for Triton Inference Server.
kits/: the sources and the page of each target; kits/shared/: sources that several kits use.
"""
