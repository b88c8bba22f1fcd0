"""`h2cache demo`: a page on which a cache is turned and watched."""
