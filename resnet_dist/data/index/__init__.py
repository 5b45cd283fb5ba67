"""Which images a data set has: formats, listings, image headers, index files."""
