"""Pathways in other libraries' savers, loaders and trainers: one module for each, which alone imports that library."""
