"""Ground floor: helpers that know nothing of fields, solvers or networks. Every folder may import them."""
