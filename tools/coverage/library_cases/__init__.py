"""Tiny models of libraries, one file per kind: real classes, random weights.

| file | models |
|---|---|
| case.py | what a case is |
| images.py | diffusers: images |
| videos.py | diffusers: videos |
| vision.py | timm, transformers, vit-pytorch: encoders of images and of videos |
| tracking.py | sam2, transformers: objects and points followed from image to image |
| speech.py | transformers and others: speech, audio |
| rotary.py | rotary-embedding-torch, x-transformers, torchscale: the libraries of rope itself |
| science.py | proteins, time series, tables, texts |
"""

from __future__ import annotations

from library_cases import images, rotary, science, speech, tracking, videos, vision
from library_cases.case import Case

CASES: dict[str, Case] = {
    case.name: case()
    for module in (images, videos, vision, tracking, speech, rotary, science)
    for case in module.CASES
}
