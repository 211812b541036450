"""What `python -m simclr_fast.evaluate` does, one protocol a file: its `Settings` (flags) and `run`."""
