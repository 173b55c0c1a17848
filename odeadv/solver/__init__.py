"""`solve`, `driven` and `compile_solver`: from arguments to a `Solution`. Imports support, fields, splitting and costate."""
