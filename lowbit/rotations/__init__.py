"""Equivalent networks that are easier to quantize: one transform per file."""
