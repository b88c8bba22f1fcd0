"""Models, as far as caches meet them."""
