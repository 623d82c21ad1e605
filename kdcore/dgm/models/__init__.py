"""The graphical models of the published experiments, at their sizes and at smaller ones."""
