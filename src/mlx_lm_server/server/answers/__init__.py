"""What is asked of an engine, and what its tokens say, whatever the protocol."""
