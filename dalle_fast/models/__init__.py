"""The models: modules with our own clean parameter names, no block sizes."""
