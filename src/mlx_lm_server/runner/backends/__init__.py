"""What differs by device."""
