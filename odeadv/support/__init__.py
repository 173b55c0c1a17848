"""Helpers that do not depend on fields, solvers or networks. Every folder may import them."""
