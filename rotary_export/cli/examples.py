"""Two examples of each command, as its `--help` shows them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, str]] = {
    "cli": (
        "rotary-export export --dim 64 --max-seq-len 2048 --out rope",
        "rotary-export export --help",
    ),
    "export": (
        "rotary-export export --dim 64 --max-seq-len 2048 --out rope",
        "rotary-export export --hf-config config.json --dtype float16 --out rope",
    ),
    "export-model": (
        "rotary-export export-model ./SmolLM2-135M --out smollm",
        "rotary-export export-model my_package.models:make_model --dry-run",
    ),
    "fuse": (
        "rotary-export fuse model.onnx fused.onnx",
        "rotary-export fuse model.onnx --dry-run --why",
    ),
    "verify": (
        "rotary-export verify rope",
        "rotary-export verify smollm --model ./SmolLM2-135M",
    ),
    "run": (
        "rotary-export run rope --input inputs.npz --out outputs.npz",
        "rotary-export run rope --graph tables --input seq_len=16 --out tables.npz",
    ),
    "generate": (
        'rotary-export generate smollm --prompt "The capital of France is"',
        "rotary-export generate smollm --ids 1,2,3 --max-new-tokens 8 --json",
    ),
    "bench": (
        "rotary-export bench rope",
        "rotary-export bench smollm --past 0,512,2048",
    ),
    "deploy": (
        "rotary-export deploy cpp-onnxruntime rope --out rope-cpp",
        "rotary-export deploy triton smollm --out smollm-triton",
    ),
    "serve": (
        "rotary-export serve rope",
        "rotary-export serve smollm --engine ray --replicas 2 --http-port 9000",
    ),
    "inspect": (
        "rotary-export inspect rope",
        "rotary-export inspect model.onnx --json",
    ),
    "doctor": (
        "rotary-export doctor",
        "rotary-export doctor --json",
    ),
}


def format_examples(command: str) -> str:
    """Return the examples of a command as a paragraph of its help."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in EXAMPLES[command])))
