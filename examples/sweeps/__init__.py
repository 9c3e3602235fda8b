"""Many runs of a program: one JSON line each, several at a time, and what they say together."""
