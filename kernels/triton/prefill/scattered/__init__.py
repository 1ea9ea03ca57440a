"""Far blocks of scattered selections: the queries of a block are gathered instead of the blocks of a tile."""
