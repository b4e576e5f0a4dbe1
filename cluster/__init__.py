"""What the crynux-cluster actors are made of; no ray inside, except in `assembly` and `runtime`."""

__version__ = "0.1.0"
