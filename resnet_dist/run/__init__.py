"""What a run is besides its steps: its folder, its start, its stop, its screen and its end."""
