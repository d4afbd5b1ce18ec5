"""Helpers for the tests; nothing here imports puff_patch at import."""
