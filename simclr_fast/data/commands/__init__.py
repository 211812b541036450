"""What the commands `python -m simclr_fast.data preview|pack|check` do, one file each."""
