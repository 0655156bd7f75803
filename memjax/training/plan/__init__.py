"""Plans a run before it starts: memory, communication, settings that fit."""
