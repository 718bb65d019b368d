"""`rotary-export serve`: a bundle behind the Open Inference Protocol; ONNX needs no torch."""
