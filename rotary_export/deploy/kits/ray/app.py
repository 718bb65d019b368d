"""The application that serve.yaml names: the bundle beside this file."""

from pathlib import Path

from rotary_export.serving.ray.app import build_app

app = build_app({"bundle_dir": str(Path(__file__).parent / "bundle")})
