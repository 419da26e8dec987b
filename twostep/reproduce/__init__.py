"""`twostep reproduce EXPERIMENT`: what three papers claim, in miniature and over seeds, beside their own tables."""
