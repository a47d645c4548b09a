"""Everything between the socket and a route: bounds, keys, bodies, errors and their statuses."""
