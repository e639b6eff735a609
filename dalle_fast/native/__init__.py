"""The C++ implementation of each op: what the compiled extension is handed and what it gives back."""
