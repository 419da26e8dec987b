"""How the miniature that comes with the package is made: `python -m twostep.train.miniature`."""
