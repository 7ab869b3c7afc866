"""What runs inside the container: generate, prepare, train, serve. It sees of the SDK only its pure modules."""
