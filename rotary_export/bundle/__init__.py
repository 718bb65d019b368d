"""A bundle on disk: what it says of itself, and how it appears there whole or not at all."""
