"""Models, as far as Flux needs them."""
