"""The command line: options as dataclasses, their names, YAML. Nothing here imports torch."""
