"""The commands beside `serve` and `bench`: each is a folder, imported when it is called."""
