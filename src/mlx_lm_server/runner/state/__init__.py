"""Where K and V and other state of rows and of the prefix cache lie."""
