"""Deciding what becomes of each attention site: the plan, the length guard, the cache positions written."""
