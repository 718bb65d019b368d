"""Fuse files that other exporters and converters really write, of tiny models with random weights.

optimum, onnxruntime-genai, and what ONNX Runtime's float16 converter makes of optimum's files. Each
exporter needs packages of its own, so it gets an environment in build/exporters, made when it is
missing (some minutes). Prints one line for each file; exit code 1 if one is not as expected.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import rotary_export

ENVIRONMENTS = Path(__file__).resolve().parents[2] / "build/exporters"
PACKAGES = {
    "optimum": ["torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "onnxscript==0.7.2"],
    "genai": [
        "torch==2.13.0", "onnxruntime-genai==0.18.0", "transformers==5.23.0", "onnx-ir==1.1.0",
        "onnxruntime==1.31.1", "onnx==1.23.2",
    ],
}  # fmt: skip
FAMILIES = {
    "optimum": (
        "llama mistral qwen2 qwen3 phi3 phi gpt_neox gptj gemma gemma2 gemma3_text cohere glm "
        "olmo2 stablelm granite falcon codegen esm roformer modernbert".split()
    ),
    "genai": ["llama", "phi", "qwen3"],
}
# Precision and execution provider of genai's builder, and whether rope has nodes of its own there.
BUILDS = {("fp16", "dml"): True, ("int4", "dml"): True, ("fp32", "cpu"): False}

# Runs in the exporter's own environment: writes the model of argv[1] into the folder argv[2].
MAKE = """
import sys, torch, transformers
family, out = sys.argv[1:3]
# No two sizes are equal: genai's builder knows the LM head's weight by its shape.
sizes = dict(vocab_size=112, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
many = dict(num_key_value_heads=4)
gptj = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, **many)
wide = dict(head_dim=16)
own = dict(gptj=gptj, codegen=dict(gptj, n_ctx=64), qwen3=wide, gemma=wide, gemma2=wide,
           gemma3_text=wide, glm=wide,
           phi=dict(partial_rotary_factor=0.5, **many), gpt_neox=dict(rotary_pct=0.25, **many),
           esm=dict(position_embedding_type="rotary", mask_token_id=3))
config = transformers.AutoConfig.for_model(family, **{**sizes, **own.get(family, {})})
encoder = family in ("esm", "roformer", "modernbert")
auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
torch.manual_seed(0)
model = auto.from_config(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5.0)
"""
OPTIMUM = """
from optimum.exporters.onnx import onnx_export_from_model
task = "fill-mask" if encoder else "text-generation-with-past"
onnx_export_from_model(model, out, task=task, do_validation=False)

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
for keep in (False, True):
    half = convert_float_to_float16(onnx.load(f"{out}/model.onnx"), keep_io_types=keep)
    onnx.save(half, f"{out}/float16-{'kept' if keep else 'all'}.onnx")
"""
GENAI = """
from tokenizers import Tokenizer, models
model.save_pretrained(out)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(112)}, unk_token="w0"))
transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(out)
"""


def find_python(exporter: str) -> str:
    """Return the Python of an exporter's environment, which is made if it is missing."""
    folder = ENVIRONMENTS / exporter
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[exporter]], check=True)
    return str(python)


def write_files(exporter: str, family: str, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Let an exporter write a family's files; by name, and whether `fuse` is to find something.

    Args:
        exporter: A key of PACKAGES.
        family: Of FAMILIES.
        folder: Where to write.
    """
    python = find_python(exporter)
    script = MAKE + (OPTIMUM if exporter == "optimum" else GENAI)
    model = folder / exporter / family
    model.mkdir(parents=True)
    run = {"check": True, "capture_output": True, "cwd": folder}
    subprocess.run([python, "-W", "ignore", "-c", script, family, model], **run)
    if exporter == "optimum":
        halves = {f"optimum {family} {file.stem}": file for file in sorted(model.glob("float16-*"))}
        return {name: (path, True) for name, path in
                ({f"optimum {family}": model / "model.onnx"} | halves).items()}  # fmt: skip
    files = {}
    for (precision, provider), expected in BUILDS.items():
        out = folder / f"{family}-{precision}-{provider}"
        build = [python, "-m", "onnxruntime_genai.models.builder", "-c", folder / "cache"]
        subprocess.run([*build, "-i", model, "-o", out, "-p", precision, "-e", provider], **run)
        files[f"genai {family} {precision} {provider}"] = (out / "model.onnx", expected)
    return files


def fuse_file(name: str, path: Path, expected: bool) -> bool:
    """Fuse one file, print what was found, return whether that is as expected."""
    try:
        result = rotary_export.fuse(path, float32_tables=True)
    except rotary_export.RotaryExportError as error:
        print(f"{name}: {error}", flush=True)
        return not expected and "rotates inside" in str(error)
    worst = max(row.error.max_ulp for row in result.check.comparisons)
    how = ", ".join(sorted(set(result.fused.values())))
    half = len(result.half_tables)
    tables = f", {half} with tables put back to float32" if half else ""
    restored = sum("is restored" in note for note in result.check.notes)
    tables += f" ({restored} frequencies restored)" if restored else ""
    print(
        f"{name}: {len(result.fused)} calls fused in {result.nodes} nodes ({how}){tables}, "
        f"{worst:g} ulp",
        flush=True,
    )
    return expected and not result.why


def main() -> int:
    """Run all; return the exit code."""
    fine = True
    with tempfile.TemporaryDirectory() as temporary:
        for exporter, families in FAMILIES.items():
            for family in families:
                for name, (path, expected) in write_files(
                    exporter, family, Path(temporary)
                ).items():
                    fine &= fuse_file(name, path, expected)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
