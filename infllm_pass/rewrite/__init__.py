"""The rewriting of planned sites, stage after stage, and the report of what was done."""
