"""Pathways inside other libraries' training loops."""
