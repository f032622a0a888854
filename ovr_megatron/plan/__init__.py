"""What a recipe costs before it is submitted: parameters, memory, FLOP, hours, and the layouts that fit."""
