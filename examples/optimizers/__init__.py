"""The optimisers of `--optimizer`, a file each."""
