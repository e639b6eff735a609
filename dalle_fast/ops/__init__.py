"""The operations, one a file: the contract of its arguments, the choice of implementation, the registration."""
