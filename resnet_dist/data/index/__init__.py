"""What there is: the samples of a data set, from listings, headers and index files."""
