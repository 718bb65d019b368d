"""What each channel of a value is computed from, and whether that is a rotation."""
