"""What the crynux-cluster actors are made of; no ray inside, except in `runtime`."""

__version__ = "0.1.0"
