"""Calibration: which channels token scores read at each site of one model, measured on text; kept as data in a file."""
