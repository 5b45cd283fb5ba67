"""Which images a step takes and how they are cropped, as functions of the step."""
