"""Compressed keys carried from call to call: which caches, whose state, and when it is void."""
