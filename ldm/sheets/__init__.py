"""Many pictures on one sheet: X/Y/Z plots, prompt matrices, contact sheets (docs/grids.md)."""
