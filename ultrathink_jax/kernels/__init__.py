"""Pure array functions, each with a plain reference and faster forms of the same signature."""
