"""Who comes next and how it is seen: samples and windows, as functions of the step."""
