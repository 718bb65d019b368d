"""Where a model applies a rotary embedding, and the op in its place."""
