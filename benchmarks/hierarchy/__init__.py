"""Whether computing the two stages at different steps pays, by a search over two-stage plans."""
