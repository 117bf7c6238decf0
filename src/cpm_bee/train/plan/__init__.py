"""What a run will need, before it starts: memory, time, disk, and changes that make it fit."""
