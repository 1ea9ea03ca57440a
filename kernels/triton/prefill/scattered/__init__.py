"""Key-stationary attention to the scored blocks of scattered selections."""
