"""Facts about FX graphs: what calls mean, what memory they touch, which graphs are nested."""
