"""Rules of the mask interpreter: for each kind of call, the value of an element of its result."""
