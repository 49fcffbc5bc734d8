"""What runs the ops: one package for each backend, none of which knows another."""
