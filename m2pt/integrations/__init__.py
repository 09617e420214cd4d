"""Pathways in other libraries' savers, loaders and trainers: a module for each, which alone imports that library."""
