"""What a user may ask for besides training. Training imports none of it."""
