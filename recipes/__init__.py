"""One short file per benchmark of the paper, on one shared training engine."""
