"""C sources that are compiled on the machine they run on, where it has a C compiler."""
