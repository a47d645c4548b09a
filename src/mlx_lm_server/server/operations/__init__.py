"""What the server tells of itself: health, the cache, its documentation, the banner."""
