"""The recipes that afd ships, with their prompts and the base students; data only."""
