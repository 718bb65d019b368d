"""Whole models: find where they apply a rotary embedding, put the op there, export, prove."""
