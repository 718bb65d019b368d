"""What is exported of a rotary embedding: the graphs `tables` and `rotate`, dynamic and static.

Nothing outside this folder distinguishes the kinds of rope.

graph.py   `Graph`: module, inputs and outputs, the same for every format
config.py  `ExportConfig`: the checked arguments of an export, and a manifest's `config`
kinds.py   `RopeKind`: what an export requires of a kind of rope; which kind a module is
plain.py   the kind of `RotaryEmbedding`
scaled.py  the kind of `ScaledRotaryEmbedding`
foreign.py `RotaryEmbedding` of zeta and x-transformers, as ours
static.py  `rotate` of a static export, for every kind
"""
